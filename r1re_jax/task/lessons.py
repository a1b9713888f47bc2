"""What a step trains on: lessons (a guide with questions) as a pure function of the step."""

import functools
import random
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


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """Lessons from several sources: every tree of a step draws the source that it is from.

    The draw is a function of (seed, step, tree), so that the mixture needs no state either. A tree
    takes the lesson of its own place in its source's step: within a step no source gives an
    example twice. What was not taken in an epoch comes in others: each is shuffled anew.

    Attributes:
      sources: each of N lessons a step.
      weights: how often each is drawn, relative to the others.
      trees: N.
      seed: of the draws.

    Raises:
      ValueError: other numbers of weights than of sources, or a weight that is not above 0.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    trees: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the weights."""
        if len(self.sources) != len(self.weights) or not all(w > 0 for w in self.weights):
            raise ValueError(
                f"expected {len(self.sources)} weights above 0, found {list(self.weights)}"
            )

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        """The N lessons of a step, a pure function of the step and the source's settings."""
        chosen = [self._choice(step, tree) for tree in range(self.trees)]
        given = {which: self.sources[which].lessons(step) for which in sorted(set(chosen))}
        return tuple(given[which][tree] for tree, which in enumerate(chosen))

    def _choice(self, step: int, tree: int) -> int:
        """The number of the source of one tree."""
        draw = random.Random(f"mixture/{self.seed}/{step}/{tree}")
        return draw.choices(range(len(self.sources)), self.weights)[0]
