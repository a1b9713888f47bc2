"""Steps whose completions another model drew than the one that is trained."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from r1re_jax.rl.correction import LOGP_DIFFERENCE
from r1re_jax.rl.kinds import CorrectionKind
from r1re_jax.task import tasks
from r1re_jax.train.grpo import GRPO, make_grpo
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.optimizer import OptimizerSettings
from r1re_jax.train.sampler import make_sampler
from r1re_jax.train.state import create_state, place_params
from r1re_jax.train.update import StepResult
from tests.tiny import tiny_policy
from tests.train.world import LIMITS, layout_on, mesh_of, some_verdict, source

SETTINGS = GRPOSettings(
    steps=4,
    questions=4,
    group=3,
    kl_coefficient=0.0,
    max_logp_gap=9.0,
    optimizer=OptimizerSettings(learning_rate=1e-2),
)
SHORT = dataclasses.replace(LIMITS, completion=12)


@pytest.fixture(autouse=True, scope="module")
def _spread_rewards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "relation_reward", some_verdict)
        yield


def _begin(settings: GRPOSettings, *, sampler: str = "float32") -> GRPO:
    mesh = mesh_of(1, 1, 1)
    return make_grpo(
        settings,
        limits=SHORT,
        encoder=tiny_policy().encoder,
        source=source(trees=1, questions=4),
        seed=5,
        first=0,
        layout=layout_on(mesh)[0],
        reference=None,
        sampler=make_sampler(layout_on(mesh, dtype=sampler)[0], settings.quantise),
    )


def _step(phase: GRPO, *, sharper: float = 1.0) -> StepResult:
    """Do a step; the sampler's parameters are the trainer's times `sharper`."""
    params = place_params(layout_on(mesh_of(1, 1, 1))[1], phase.layout)
    state = create_state(params, phase.optimizer, phase.layout)
    drawn = phase.drawing.draw
    if sharper != 1:
        other = {name: value * np.float32(sharper) for name, value in params.items()}
        phase = dataclasses.replace(phase, drawing=_Other(phase.drawing, other, drawn))
    result = phase.step(state, 1, tick=lambda note: None)
    return dataclasses.replace(result, state=jax.device_get(result.state))


@dataclasses.dataclass(frozen=True)
class _Other:
    """Draws with other parameters."""

    drawing: object
    params: dict
    drawn: object

    def draw(self, params: dict, number: int, **more: object) -> object:
        return self.drawn(self.params, number, **more)


def test_a_run_draws_with_the_model_that_it_trains() -> None:
    phase = _begin(SETTINGS)
    assert phase.correction is CorrectionKind.NONE
    figures = _step(phase).metrics
    assert figures["sampling/kl"] < 1e-6 and figures["sampling/masked"] == 0
    assert figures["sampling/ess"] == pytest.approx(1, abs=1e-5)


def test_a_sampler_of_another_precision_is_corrected_by_itself() -> None:
    phase = _begin(SETTINGS, sampler="bfloat16")
    assert phase.correction is CorrectionKind.SEQUENCE_MASK
    figures = _step(phase).metrics
    assert figures[f"{LOGP_DIFFERENCE}/mean"] > 1e-4, "it rounds"
    assert 0 < figures["sampling/kl"] < 1e-2 and 0.9 < figures["sampling/ess"] < 1
    switched = _begin(dataclasses.replace(SETTINGS, correction="none"), sampler="bfloat16")
    assert switched.correction is CorrectionKind.NONE


def test_a_correction_changes_the_step() -> None:
    """The kinds by themselves are compared with plain Python in tests/rl."""
    kinds = (CorrectionKind.NONE, CorrectionKind.TOKEN_TRUNCATE, CorrectionKind.SEQUENCE_MASK)
    results = {
        kind: _step(
            _begin(dataclasses.replace(SETTINGS, correction=kind, correction_limit=1.05)),
            sharper=1.05,
        )
        for kind in kinds
    }
    texts = [[row["samples"] for row in result.completions] for result in results.values()]
    assert all(one == texts[0] for one in texts), "the same completions"
    norms = {kind: result.metrics["grad_norm"] for kind, result in results.items()}
    assert len({round(norm, 6) for norm in norms.values()}) == len(kinds), norms
    masked = {kind: result.metrics["sampling/masked"] for kind, result in results.items()}
    for kind in kinds:
        assert (masked[kind] > 0) == kind.endswith("mask"), masked
