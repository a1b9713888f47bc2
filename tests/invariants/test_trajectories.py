"""What may not change a run: micro-batches, remat, meshes, the order of questions, compaction.

The completions of one run are fed to its variants, so that a token that rounding would have drawn
otherwise does not part them. Their first completions, drawn by themselves, are the same. Variants
that draw all by themselves may part from it only at a tie.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.qwen import Cache, Remat
from r1re_jax.model.tree import Level
from r1re_jax.rollout.decode import prefill
from r1re_jax.rollout.keys import token_keys
from r1re_jax.rollout.rollout import Rollout, generate
from r1re_jax.rollout.sampling import gumbel
from r1re_jax.task import tasks
from r1re_jax.task.lessons import Lesson, Source
from r1re_jax.train import drawing as drawing_module
from r1re_jax.train.grpo import GRPO, make_grpo
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.optimizer import OptimizerSettings
from r1re_jax.train.state import TrainState, create_state, place_params
from tests.tiny import tiny_policy
from tests.train.world import LIMITS, layout_on, mesh_of, some_verdict, source

STEPS = 20
SETTINGS = GRPOSettings(
    steps=STEPS,
    questions=4,
    group=3,
    kl_coefficient=0.1,
    inner_iterations=2,
    entropy_coefficient=0.01,
    chunk=2,
    compaction=0,
    optimizer=OptimizerSettings(learning_rate=3e-3, eps=1e-3),
)
SHORT = dataclasses.replace(LIMITS, completion=10)


@dataclasses.dataclass(frozen=True)
class _Reversed:
    """The questions of every lesson from the last to the first."""

    inner: Source

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        lessons = self.inner.lessons(step)
        return tuple(Lesson(one.guide, one.examples[::-1]) for one in lessons)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the run that is compared with."""

    mesh: tuple[int, ...] = (1, 1, 1)
    remat: Remat = Remat.NONE
    micro_batch: int = 0
    backwards: bool = False
    compaction: int = 0

    def turned(self, rollout: Rollout) -> Rollout:
        """A rollout with its questions in this variant's order, or back."""
        if not self.backwards:
            return rollout
        return jax.tree.map(lambda x: np.asarray(x)[:, ::-1], rollout)

    def begin(self) -> tuple[GRPO, TrainState]:
        """A phase, and the state that all begin with."""
        layout, params = layout_on(mesh_of(*self.mesh), remat=self.remat)
        lessons = source(trees=1, questions=4)
        phase = make_grpo(
            dataclasses.replace(SETTINGS, micro_batch=self.micro_batch, compaction=self.compaction),
            limits=SHORT,
            encoder=tiny_policy().encoder,
            source=_Reversed(lessons) if self.backwards else lessons,
            seed=5,
            first=0,
            layout=layout,
            reference=place_params(params, layout),
        )
        return phase, create_state(place_params(params, layout), phase.optimizer, layout)


def _drawn(*args: Any, **more: Any) -> Rollout:
    """Completions of many lengths: many tokens end one, which random weights would seldom draw."""
    more["stop_ids"] = range(0, tiny_policy().config.vocab, 9)
    return jax.device_get(generate(*args, **more))


def _trajectory(variant: Variant, draw: Callable[..., Rollout]) -> list[dict[str, float]]:
    """Figures of all steps with what `draw` draws."""
    phase, state = variant.begin()
    figures = []
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(drawing_module, "generate", draw)
        for number in range(1, STEPS + 1):
            result = phase.step(state, number, tick=lambda note: None)
            state = result.state
            figures.append(result.metrics)
    return figures


@pytest.fixture(autouse=True, scope="module")
def _spread_rewards() -> Iterator[None]:
    """Rewards that differ within a group, which those of random weights do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "relation_reward", some_verdict)
        yield


@pytest.fixture(scope="module")
def whole() -> tuple[list[dict[str, float]], list[Rollout]]:
    """The run that the others are compared with, and what it drew."""
    drawn: list[Rollout] = []

    def draw(*args: Any, **more: Any) -> Rollout:
        drawn.append(_drawn(*args, **more))
        return drawn[-1]

    figures = _trajectory(Variant(), draw)
    moved = [abs(figures[-1][name] - figures[0][name]) for name in ("entropy", "kl")]
    assert min(moved) > 1e-3, "it goes somewhere"
    lengths = {int(length) for rollout in drawn for length in rollout.length.flat}
    assert len(lengths) > 5, "and rows end at different times"
    return figures, drawn


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(Variant(micro_batch=1), id="micro-batches of 1"),
        pytest.param(Variant(micro_batch=2, remat=Remat.LAYER), id="micro-batches of 2 and remat"),
        pytest.param(Variant(backwards=True), id="questions from the last to the first"),
        pytest.param(Variant(compaction=4), id="finished rows dropped"),
        pytest.param(Variant(mesh=(2, 2, 2), compaction=4), id="data 2, fsdp 2, tensor 2, dropped"),
        pytest.param(Variant(mesh=(1, 2, 1, 2), remat=Remat.LAYER), id="fsdp 2, sequence 2, remat"),
        pytest.param(
            Variant(mesh=(1, 1, 1, 8), micro_batch=1),
            id="sequence 8, which does not divide completions",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Variant(mesh=(1, 2, 2, 2)), id="fsdp 2, tensor 2, sequence 2", marks=pytest.mark.slow
        ),
        pytest.param(Variant(mesh=(4, 1, 1)), id="data 4", marks=pytest.mark.slow),
        pytest.param(Variant(mesh=(1, 4, 1)), id="fsdp 4", marks=pytest.mark.slow),
        pytest.param(Variant(mesh=(1, 1, 2)), id="tensor 2", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_same(
    variant: Variant, whole: tuple[list[dict[str, float]], list[Rollout]]
) -> None:
    expected, drawn = whole
    first, left = [], list(drawn)

    def draw(*args: Any, **more: Any) -> Rollout:
        if not first:
            first.append(_drawn(*args, **more))
        return variant.turned(left.pop(0))

    figures = _trajectory(variant, draw)
    assert not left
    begun = variant.turned(first[0])
    for name in ("tokens", "length", "truncated"):
        np.testing.assert_array_equal(getattr(begun, name), getattr(drawn[0], name))
    np.testing.assert_allclose(begun.logp, drawn[0].logp, atol=1e-5)
    for step, (found, wanted) in enumerate(zip(figures, expected, strict=True), 1):
        for name in ("loss", "kl", "entropy", "old_kl", "reward", "learning_rate"):
            np.testing.assert_allclose(
                found[name], wanted[name], atol=1e-5, err_msg=f"{name} of step {step}"
            )
        np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-3)


class _Parted(Exception):
    """Two runs drew different tokens, at a tie."""


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(Variant(micro_batch=2, remat=Remat.LAYER), id="micro-batches of 2 and remat"),
        pytest.param(Variant(mesh=(2, 2, 2), backwards=True), id="eight devices, backwards"),
        pytest.param(Variant(compaction=4), id="finished rows dropped"),
    ],
)
def test_running_free_only_a_tie_parts_two_runs(
    variant: Variant, whole: tuple[list[dict[str, float]], list[Rollout]]
) -> None:
    left = list(whole[1])

    def draw(*args: Any, **more: Any) -> Rollout:
        found, wanted = _drawn(*args, **more), variant.turned(left.pop(0))
        gaps = _gaps(found, wanted, *args, ancestors=more["ancestors"], keys=more["keys"])
        assert np.all(gaps < 1e-4), f"step {STEPS - len(left)} parts from the run: {gaps}"
        if gaps.size:
            raise _Parted
        return found

    try:
        _trajectory(variant, draw)
    except _Parted:
        assert len(left) < STEPS - 1, "the first completions are the same"
    else:
        assert not left


def test_what_is_no_tie_is_told(whole: tuple[list[dict[str, float]], list[Rollout]]) -> None:
    first = whole[1][0]
    other = np.array(first.tokens)
    other[0, 1, 2, 3] = (other[0, 1, 2, 3] + 1) % 7

    def draw(*args: Any, **more: Any) -> Rollout:
        found = _drawn(*args, **more)
        changed = dataclasses.replace(first, tokens=other)
        gaps = _gaps(found, changed, *args, ancestors=more["ancestors"], keys=more["keys"])
        assert gaps.shape == (1,)
        assert gaps[0] > 1e-4
        raise _Parted

    with pytest.raises(_Parted):
        _trajectory(Variant(), draw)


def _gaps(
    found: Rollout,
    wanted: Rollout,
    graph: nnx.GraphDef,
    params: nnx.State,
    levels: Sequence[Level],
    *,
    ancestors: Sequence[Cache],
    keys: jax.Array,
) -> np.ndarray:
    """Gap of the top two perturbed logits at the first token that differs, for each such row."""
    gaps = []
    for where in np.argwhere((found.tokens != wanted.tokens).any(-1)):
        row = tuple(where)
        token = int(np.argmax(found.tokens[row] != wanted.tokens[row]))
        before = Level(found.tokens, np.full_like(found.length, token))
        below = (*levels, before) if token else levels
        hidden, _ = prefill(graph, params, below, ancestors=ancestors)
        logits_V = nnx.merge(graph, params).logits(hidden[row if token else row[:-1]])
        noise_V = gumbel(token_keys(keys, np.int32(token)), logits_V.shape[-1])[row]
        first, second = jax.lax.top_k(logits_V + noise_V, 2)[0]
        gaps.append(float(first - second))
    return np.array(gaps)
