"""GRPO whose completions a quantised copy of the policy draws."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.model.int8 import Quantisation
from r1re_jax.model.lora import Lora, adapt
from r1re_jax.model.qwen import abstract_qwen
from r1re_jax.rl.correction import LOGP_DIFFERENCE
from r1re_jax.rl.kinds import CorrectionKind
from r1re_jax.task import tasks
from r1re_jax.train.grpo import GRPO, make_grpo
from r1re_jax.train.grpo_settings import GRPOSettings, QuantiseSettings
from r1re_jax.train.optimizer import OptimizerSettings
from r1re_jax.train.state import (
    Layout,
    Params,
    create_state,
    fresh_adapter,
    model_layout,
    place_params,
)
from r1re_jax.train.update import SamplerDriftError, StepResult
from tests.quantised import MATRICES, by_hand
from tests.tiny import tiny_policy
from tests.train import world
from tests.train.world import LIMITS, layout_on, mesh_of, some_verdict, source

BOTH = QuantiseSettings(weights="int8", cache="int8")
SETTINGS = GRPOSettings(
    steps=4,
    questions=4,
    group=3,
    chunk=4,
    kl_coefficient=0.0,
    quantise=BOTH,
    optimizer=OptimizerSettings(learning_rate=1e-2),
)
SHORT = dataclasses.replace(LIMITS, completion=12)


@pytest.fixture(autouse=True, scope="module")
def _spread_rewards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "relation_reward", some_verdict)
        yield


def _begin(settings: GRPOSettings, layout: Layout, frozen: Params | None = None) -> GRPO:
    return make_grpo(
        settings,
        limits=SHORT,
        encoder=tiny_policy().encoder,
        source=source(trees=1, questions=4),
        seed=5,
        first=0,
        layout=layout,
        reference=None,
        frozen=frozen,
    )


def _step(settings: GRPOSettings, mesh: tuple[int, int, int] = (1, 1, 1)) -> StepResult:
    layout, params = layout_on(mesh_of(*mesh))
    phase = _begin(settings, layout)
    state = create_state(place_params(params, layout), phase.optimizer, layout)
    result = phase.step(state, 1, tick=lambda note: None)
    return dataclasses.replace(result, state=jax.device_get(result.state))


@pytest.mark.parametrize("name", ["weights", "cache"])
def test_the_correction_is_on_where_anything_is_quantised(name: str) -> None:
    layout, _ = layout_on(world.one_device_mesh())
    kinds = {
        value: _begin(
            dataclasses.replace(SETTINGS, quantise=QuantiseSettings(**{name: value})), layout
        ).correction
        for value in Quantisation
    }
    assert kinds == {"none": CorrectionKind.NONE, "int8": CorrectionKind.SEQUENCE_MASK}
    for kind in (CorrectionKind.NONE, CorrectionKind.TOKEN_TRUNCATE):
        asked = dataclasses.replace(SETTINGS, correction=kind)
        assert _begin(asked, layout).correction is kind


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        QuantiseSettings(weights="int4")


def test_a_run_without_it_draws_with_the_trained_model_and_its_own_arrays() -> None:
    layout, params = layout_on(world.one_device_mesh())
    phase = _begin(dataclasses.replace(SETTINGS, quantise=QuantiseSettings()), layout)
    assert phase.drawing.sampler.layout.graph == layout.graph, "one program serves both"
    assert phase.drawing.sampler.params(params) is params


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_samplers_weights_are_the_policys_rounded(mesh: tuple[int, int, int]) -> None:
    layout, params = layout_on(mesh_of(*mesh))
    sampler = _begin(SETTINGS, layout).drawing.sampler
    placed = place_params(params, layout)
    found = sampler.params(placed)
    assert found.keys() == sampler.layout.shapes.keys()
    for name, shape in sampler.layout.shapes.items():
        assert found[name].sharding.is_equivalent_to(shape.sharding, found[name].ndim), name
        assert (found[name].shape, found[name].dtype) == (shape.shape, shape.dtype), name
    for name in MATRICES:
        number, scale = by_hand(params[name], -2)
        np.testing.assert_array_equal(found[name], number, err_msg=name)
        of_scale = found[name.replace("weight", "scale")]
        np.testing.assert_allclose(of_scale, scale[..., 0, :], rtol=1e-6)
    # The others are shared, but for those that a mesh draws with elsewhere than it trains them.
    others = placed.keys() - set(MATRICES)
    assert all(found[name] is placed[name] for name in others - set(sampler.copied))
    for name in others:
        np.testing.assert_array_equal(found[name], placed[name], err_msg=name)
    assert mesh != (1, 1, 1) or not others & set(sampler.copied)
    assert not any(leaf.is_deleted() for leaf in placed.values())


def test_a_step_reports_what_the_sampler_rounds() -> None:
    figures = _step(SETTINGS).metrics
    assert 1e-4 < figures[f"{LOGP_DIFFERENCE}/mean"] < figures[f"{LOGP_DIFFERENCE}/max"] < 0.1
    assert 1e-4 < figures[f"{LOGP_DIFFERENCE}/mean_long"] < figures[f"{LOGP_DIFFERENCE}/max"]
    assert 0 < figures["sampling/kl"] < 1e-2 and 0.9 < figures["sampling/ess"] < 1
    assert figures["sampling/masked"] == figures["sampling/masked_long"] == 0
    strict = _step(dataclasses.replace(SETTINGS, correction_limit=1.0)).metrics
    assert 0 < strict["sampling/masked"] < 1 and 0 < strict["sampling/masked_long"] <= 1


def test_a_sampler_that_rounds_too_much_stops_the_run() -> None:
    with pytest.raises(SamplerDriftError, match="max_logp_gap = 0.0001.*grpo.quantise"):
        _step(dataclasses.replace(SETTINGS, max_logp_gap=1e-4))


def test_a_mesh_changes_no_step() -> None:
    one, many = _step(SETTINGS), _step(SETTINGS, (2, 2, 2))
    texts = [[[s["text"] for s in row["samples"]] for row in x.completions] for x in (one, many)]
    assert texts[0] == texts[1]
    for name in (
        "loss",
        f"{LOGP_DIFFERENCE}/mean",
        f"{LOGP_DIFFERENCE}/mean_long",
        "sampling/kl",
    ):
        assert many.metrics[name] == pytest.approx(one.metrics[name], rel=2e-2, abs=1e-4), name


def test_an_adapter_is_trained_beside_an_int8_base() -> None:
    policy = tiny_policy()
    model = adapt(abstract_qwen(policy.config), Lora(rank=2, alpha=8.0))
    layout = model_layout(model, world.one_device_mesh())
    params = layout_on(world.one_device_mesh())[1]
    frozen = {n: jax.device_put(params[n], x.sharding) for n, x in layout.frozen.items()}
    phase = _begin(SETTINGS, layout, frozen)
    adapter = fresh_adapter(layout, seed=3)
    drawing = phase.drawing.sampler.params({**frozen, **adapter})
    assert all(drawing[name] is adapter[name] for name in adapter), "the adapter stays float"
    assert drawing["layers.up.weight"].dtype == jnp.int8
    state = create_state(adapter, phase.optimizer, layout)
    result = phase.step(state, 1, tick=lambda note: None)
    assert result.state.params.keys() == layout.shapes.keys()
    assert 1e-4 < result.metrics[f"{LOGP_DIFFERENCE}/mean"] < 0.1


def test_a_run_with_both_saves_floats(tmp_path: pathlib.Path) -> None:
    """`test_options_together` interrupts one and goes on."""
    inputs = world.write_inputs(tmp_path)
    settings = world.settings(
        inputs, sft__steps=1, grpo__quantise={"weights": "int8", "cache": "int8"}
    )
    world.train(settings, tmp_path / "run")
    rows = world.metrics(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["sft", "grpo", "grpo"]
    assert all(
        0 < row[f"{LOGP_DIFFERENCE}/mean"] < 0.1 and "sampling/masked_long" in row
        for row in rows[1:]
    )
    saved = world.checkpoint_params(tmp_path / "run", 3)
    assert all(value.dtype == np.float32 for value in saved.values()), "never int8"
