"""The warm start: its loss is the mean over tokens, whatever the micro-batch or the mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from r1re_jax.model.qwen import Remat
from r1re_jax.model.tree import LimitError
from r1re_jax.task.completions import Thoughts, sft_completion
from r1re_jax.task.lessons import DatasetSource, Lesson
from r1re_jax.train.optimizer import OptimizerSettings
from r1re_jax.train.settings import SFTSettings
from r1re_jax.train.sft import SFT, make_sft, sft_tree
from r1re_jax.train.state import TrainState, create_state, place_params
from r1re_jax.train.update import NonFiniteError, StepResult
from tests.tiny import tiny_policy
from tests.train.world import LIMITS, layout_on, mesh_of, source

SETTINGS = SFTSettings(
    steps=4, trees=2, questions=4, optimizer=OptimizerSettings(learning_rate=1e-2)
)


def _begin(
    settings: SFTSettings = SETTINGS,
    *,
    mesh: tuple[int, int, int] = (1, 1, 1),
    remat: Remat = Remat.NONE,
) -> tuple[SFT, TrainState]:
    layout, params = layout_on(mesh_of(*mesh), remat=remat)
    phase = make_sft(
        settings,
        limits=LIMITS,
        encoder=tiny_policy().encoder,
        source=source(trees=settings.trees, questions=settings.questions),
        layout=layout,
    )
    return phase, create_state(place_params(params, layout), phase.optimizer, layout)


def _do(phase: SFT, state: TrainState, number: int = 1) -> StepResult:
    return phase.step(state, number, tick=lambda note: None)


@pytest.fixture(scope="module")
def whole() -> tuple[SFT, StepResult, StepResult]:
    phase, state = _begin()
    first = _do(phase, state)
    host = dataclasses.replace(first, state=jax.device_get(first.state))
    return phase, host, _do(phase, first.state, 2)


def test_loss_is_the_mean_negative_log_probability_of_completion_tokens(whole) -> None:
    policy = tiny_policy()
    rows, starts = [], []
    for lesson in source(trees=2, questions=4).lessons(0):
        for example in lesson.examples:
            prompt = policy.encoder.prompt_tokens(lesson.guide, example)
            starts.append(len(prompt))
            rows.append(prompt + policy.encoder.completion_tokens(sft_completion(example)))
    losses = []
    for row, start, logits_TV in zip(rows, starts, policy.logits(rows), strict=True):
        logits = logits_TV.astype(np.float64)
        logp_TV = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logp_TV[place - 1, row[place]] for place in range(start, len(row))]
    _, first, _ = whole
    np.testing.assert_allclose(first.metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(first.metrics["completions/mean_length"], len(losses) / 8)
    assert first.metrics["learning_rate"] == pytest.approx(1e-2)


def test_the_answer_alone_can_be_taught() -> None:
    encoder, (lesson, *_) = tiny_policy().encoder, source(trees=1, questions=4).lessons(0)
    taught = SFTSettings(thoughts=Thoughts.NONE).taught
    tree = sft_tree([lesson], encoder, LIMITS, taught=taught)
    for example, (tokens,), (length,) in zip(
        lesson.examples, tree.completion.tokens[0], tree.completion.length[0], strict=True
    ):
        text = encoder.decode(tokens[:length])
        assert text == f"<think>-</think><answer>{example.label}</answer>"


def test_training_lowers_the_loss_and_compiles_once(whole) -> None:
    phase, first, second = whole
    assert second.metrics["loss"] < first.metrics["loss"]
    assert phase.programs.gradient._cache_size() == phase.programs.apply._cache_size() == 1


@dataclasses.dataclass
class _Asked:
    """Lessons as they are, and which steps' were asked for."""

    source: DatasetSource
    steps: list[int] = dataclasses.field(default_factory=list)

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        self.steps.append(step)
        return self.source.lessons(step)


@pytest.mark.parametrize(
    ("cycle", "expected"), [(0, [0, 1, 2, 3]), (1, [0] * 4), (3, [0, 1, 2, 0])]
)
def test_a_cycle_repeats_the_first_lessons(cycle: int, expected: list[int]) -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, questions=2, cycle=cycle))
    asked = _Asked(source(trees=2, questions=2))
    phase = dataclasses.replace(phase, source=asked)
    for number in range(1, 5):
        state = _do(phase, state, number).state
    assert asked.steps == expected


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_change_nothing(whole, micro_batch: int) -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, micro_batch=micro_batch))
    result = _do(phase, state)
    _, first, _ = whole
    for name in ("loss", "entropy", "grad_norm", "completions/mean_length"):
        np.testing.assert_allclose(result.metrics[name], first.metrics[name], rtol=1e-5)
    _close(result.state.params, first.state.params)


def test_a_mesh_changes_nothing(whole) -> None:
    phase, state = _begin(mesh=(2, 2, 2))
    result = _do(phase, state)
    _, first, _ = whole
    np.testing.assert_allclose(result.metrics["loss"], first.metrics["loss"], rtol=1e-5)
    _close(jax.device_get(result.state.params), first.state.params)


def test_recomputing_changes_nothing(whole) -> None:
    result = _do(*_begin(remat=Remat.LAYER))
    _, first, _ = whole
    _close(result.state.params, first.state.params)


def test_a_gradient_that_is_not_finite_leaves_the_state_alone() -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, micro_batch=4))
    broken = dict(state.params)
    broken["norm.weight"] = broken["norm.weight"] * np.float32(np.inf)
    state = dataclasses.replace(state, params=broken)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        _do(phase, state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_request_to_stop_leaves_the_state_alone() -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, micro_batch=4))
    seen = []

    def tick(note: str) -> None:
        seen.append(note)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phase.step(state, 1, tick=tick)
    assert seen == ["update", "update"]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_completion_that_is_too_long_is_refused() -> None:
    phase, state = _begin()
    short = dataclasses.replace(phase, limits=dataclasses.replace(LIMITS, completion=20))
    with pytest.raises(LimitError, match="8 of 8 completions are longer"):
        _do(short, state)


def _close(ours: dict, expected: dict) -> None:
    """Equal to rounding; Adam's first step is the gradient's sign: rounding shows near 0 only."""
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-5, err_msg=name)
