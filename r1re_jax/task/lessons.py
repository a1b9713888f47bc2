"""What a step trains on: lessons (a guide with questions) as a pure function of the step."""

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

from r1re_jax.task.relations import Guide
from r1re_jax.task.tasks import AnyExample


@dataclass(frozen=True)
class Lesson:
    """One tree of a batch: a guide and the examples that are asked under it."""

    guide: Guide
    examples: tuple[AnyExample, ...]


class Source(Protocol):
    """Where a training loop gets its lessons."""

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        """The N lessons of a step, of P examples each; a pure function of the step."""
        ...


@dataclass(frozen=True)
class DatasetSource:
    """Lessons from one data set: every epoch is a new shuffle, and no step holds an example twice.

    The order comes from grain's index-addressed shuffle, so that a restart at any step needs no
    state. An epoch's last examples that fill no whole step are left out of it; the next epoch's
    shuffle brings others to that place.

    Attributes:
      guide: the guide of every lesson.
      examples: the training examples.
      questions: P, examples of a lesson.
      trees: N, lessons of a step.
      seed: seed of the shuffle.

    Raises:
      ValueError: fewer examples than one step takes.
    """

    guide: Guide
    examples: tuple[AnyExample, ...]
    questions: int = field(kw_only=True)
    trees: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the sizes and makes `examples` a tuple."""
        object.__setattr__(self, "examples", tuple(self.examples))
        if self.questions < 1 or self.trees < 1:
            raise ValueError(
                f"expected questions >= 1 and trees >= 1, found {self.questions} and {self.trees}"
            )
        if len(self.examples) < self.per_step:
            raise ValueError(
                f"a step takes {self.trees} x {self.questions} = {self.per_step} examples, found "
                f"{len(self.examples)} in all; give more data or a smaller step"
            )

    @property
    def per_step(self) -> int:
        """Examples of a step, N·P."""
        return self.trees * self.questions

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass over the examples."""
        return len(self.examples) // self.per_step

    @functools.cached_property
    def _order(self) -> Any:
        # Imported here because reading examples should not need the input pipeline.
        import grain

        return grain.MapDataset.range(len(self.examples)).seed(self.seed).shuffle().repeat()

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        """The lessons of a step, a pure function of the step and the source's settings."""
        if step < 0:
            raise ValueError(f"expected step >= 0, found {step}")
        epoch, within = divmod(step, self.steps_per_epoch)
        first = epoch * len(self.examples) + within * self.per_step
        chosen = [
            self.examples[int(self._order[first + offset])] for offset in range(self.per_step)
        ]
        rows = (
            chosen[start : start + self.questions]
            for start in range(0, self.per_step, self.questions)
        )
        return tuple(Lesson(self.guide, tuple(row)) for row in rows)
