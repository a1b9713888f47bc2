"""Checkpoints: the same bits on any mesh, the best and the last kept, whole or not at all."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from r1re_jax.train.checkpoint import (
    Checkpoints,
    Meta,
    best_step,
    keep_reference,
    load_reference,
)
from r1re_jax.train.optimizer import OptimizerSettings, make_optimizer
from r1re_jax.train.settings import Phase
from r1re_jax.train.state import Layout, Params, TrainState, create_state, place_params
from tests.train.world import assert_bit_equal, layout_on, mesh_of, one_device_mesh


def _meta(step: int, **changes: object) -> Meta:
    fixed = dict(phase=Phase.SFT, configuration="abc", versions={"jax": "1"}, scores={})
    return Meta(step=step, **{**fixed, **changes})


def _made(
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Layout, optax.GradientTransformation]:
    """A state after an update, so that its moments are not zero."""
    layout, params = layout_on(mesh)
    settings = OptimizerSettings(learning_rate=0.1)
    optimizer = make_optimizer(settings, matrices=layout.matrices)
    state = create_state(place_params(params, layout), optimizer, layout, step=3)

    @jax.jit
    def update(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        grads = jax.tree.map(lambda x: x * 0.5 + 0.25, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = update(state.params, state.opt_state)
    return dataclasses.replace(state, params=params, opt_state=opt_state), layout, optimizer


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)])
def test_a_state_comes_back_bit_by_bit_on_another_mesh(
    tmp_path: pathlib.Path, mesh: tuple[int, int, int]
) -> None:
    state, _, optimizer = _made(mesh_of(2, 2, 2))
    checkpoints = Checkpoints(tmp_path, keep=1, scores={})
    checkpoints.save(state, _meta(3))
    checkpoints.close()
    layout, _ = layout_on(mesh_of(*mesh))
    again = Checkpoints(tmp_path, keep=1, scores={})
    found = again.restore(3, layout=layout, optimizer=optimizer)
    again.close()
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, state)
    assert all(
        found.params[name].sharding.is_equivalent_to(where, found.params[name].ndim)
        for name, where in layout.shardings.items()
    )


def test_a_save_is_not_touched_by_the_next_update(tmp_path: pathlib.Path) -> None:
    state, layout, optimizer = _made(one_device_mesh())
    before = jax.device_get(state.params)
    checkpoints = Checkpoints(tmp_path, keep=1, scores={})
    checkpoints.save(state, _meta(3))
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    jax.block_until_ready(overwrite(state))
    found = checkpoints.restore(3, layout=layout, optimizer=optimizer)
    checkpoints.close()
    assert_bit_equal(jax.device_get(found.params), before)


def test_the_last_ones_and_the_best_are_kept(tmp_path: pathlib.Path) -> None:
    state, _, _ = _made(one_device_mesh())
    scores: dict[int, float] = {}
    checkpoints = Checkpoints(tmp_path, keep=2, scores=scores)
    for step, score in enumerate((0.1, 0.7, None, 0.7, 0.3, None), start=1):
        if score is not None:
            scores[step] = score
        checkpoints.save(state, _meta(step, scores=scores))
    checkpoints.wait()
    assert checkpoints.steps == [2, 5, 6]
    assert checkpoints.holds(6) and not checkpoints.holds(7)
    assert best_step(checkpoints.steps, scores) == 2, "the earliest of equals"
    assert checkpoints.meta(6).scores == scores
    checkpoints.close()
    later = Checkpoints(tmp_path, keep=1, scores=dict(scores))
    assert later.steps == [2, 5, 6] and later.holds(2)
    later.save(state, _meta(7))
    later.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 7]


def test_meta_goes_to_json_and_back(tmp_path: pathlib.Path) -> None:
    state, _, _ = _made(one_device_mesh())
    meta = _meta(4, phase=Phase.GRPO, scores={2: 0.5}, pending={"reward": 1.5, "phase": "grpo"})
    assert Meta.from_json(meta.to_json()) == meta
    checkpoints = Checkpoints(tmp_path, keep=1, scores={})
    checkpoints.save(state, meta)
    checkpoints.wait()
    assert checkpoints.meta(4) == meta
    checkpoints.close()


def test_remains_of_an_interrupted_save_are_no_checkpoint(tmp_path: pathlib.Path) -> None:
    state, _, _ = _made(one_device_mesh())
    checkpoints = Checkpoints(tmp_path, keep=2, scores={})
    checkpoints.save(state, _meta(1))
    checkpoints.close()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    again = Checkpoints(tmp_path, keep=2, scores={})
    assert again.steps == [1]
    again.save(state, _meta(2))
    again.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_parameters_can_be_read_alone_by_name(tmp_path: pathlib.Path) -> None:
    state, layout, _ = _made(one_device_mesh())
    checkpoints = Checkpoints(tmp_path, keep=1, scores={})
    checkpoints.save(state, _meta(1))
    checkpoints.close()
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (tmp_path / "checkpoints" / "1" / "params").absolute()
        found = checkpointer.restore(folder, dict(layout.shapes))
    assert_bit_equal(jax.device_get(found), jax.device_get(state.params))


def test_a_reference_is_kept_once(tmp_path: pathlib.Path) -> None:
    state, layout, _ = _made(one_device_mesh())
    with pytest.raises(FileNotFoundError, match="the reference policy of this run"):
        load_reference(tmp_path, layout, step=2)
    keep_reference(tmp_path, state.params, step=2)
    other = jax.tree.map(lambda x: x + 1, state.params)
    keep_reference(tmp_path, other, step=2)
    away = load_reference(tmp_path, layout, step=2, on_host=True)
    assert {leaf.sharding.memory_kind for leaf in away.values()} == {"pinned_host"}
    found = load_reference(tmp_path, layout, step=2)
    for loaded in (found, away):
        assert_bit_equal(jax.device_get(loaded), jax.device_get(state.params))
    jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)(state.params)
    assert not any(leaf.is_deleted() for leaf in found.values())
