"""Groups of completions as a GRPO step draws, judges and chooses them; all on the host."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from r1re_jax.model.tree import Level
from r1re_jax.rollout.rollout import Rollout
from r1re_jax.task.tasks import AnyExample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What is kept of a completion and its verdict: plain JSON values, which go from host to host.

    Attributes:
        text: of the completion.
        reward: in all, further penalties with it.
        parts: R rewards that are compared within their groups each by itself.
        format_ok: as of the verdict, as are those that follow.
        correct: see there.
        predicted: see there.
        figures: see there.
    """

    text: str
    reward: float
    parts: Sequence[float]
    format_ok: bool
    correct: bool
    predicted: Any
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """P questions of each of N guides, G completions of each question.

    Attributes:
        examples: [N, P] examples.
        question: their tokens [N, P, Q].
        rollout: the completions [N, P, G].
        verdicts: [N, P, G] of `Judged`.
        reward: [N, P, G] fp32, in all.
        parts: [N, P, G, R] fp32, the rewards that are compared within their groups each by itself.
        overlong: [N, P, G] fp32, penalties of long completions; 0 where there are none.
    """

    examples: np.ndarray
    question: Level
    rollout: Rollout
    verdicts: np.ndarray
    reward: np.ndarray
    parts: np.ndarray
    overlong: np.ndarray

    @property
    def signal(self) -> np.ndarray:
        """[N, P] bool: a reward differs within the group, so that it says what is better."""
        return (np.ptp(self.parts, axis=-2) != 0).any(axis=-1)

    def places(self, questions: int) -> np.ndarray:
        """[N, questions]: which to keep, those with signal first, then those drawn first."""
        order_NP = np.argsort(~self.signal, axis=1, kind="stable")
        return np.sort(order_NP[:, :questions], axis=1)

    def choose(self, questions: int) -> "Groups":
        """Keep `questions` of each guide, those that `places` says."""
        chosen_NP = self.places(questions)
        trees_N1 = np.arange(len(chosen_NP))[:, None]
        return _map(lambda array: array[trees_N1, chosen_NP], self)


def join(groups: Sequence[Groups]) -> Groups:
    """Put the questions of several drawings side by side, below the same N guides."""
    return _map(lambda *arrays: np.concatenate(arrays, axis=1), *groups)


def as_examples(rows: Sequence[Sequence[AnyExample]]) -> np.ndarray:
    """Return [N, P] examples as an array of objects."""
    out = np.empty((len(rows), len(rows[0])), object)
    for tree, row in enumerate(rows):
        out[tree] = row
    return out


def _map(function: Callable[..., np.ndarray], *groups: Groups) -> Groups:
    """Apply `function` to every array, those of levels and rollouts included."""

    def joined(values: Sequence[Any]) -> Any:
        if isinstance(values[0], np.ndarray):
            return function(*values)
        names = [field.name for field in dataclasses.fields(values[0])]
        parts = {name: joined([getattr(value, name) for value in values]) for name in names}
        return dataclasses.replace(values[0], **parts)

    return joined(groups)
