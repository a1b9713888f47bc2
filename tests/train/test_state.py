"""State: made sharded, equal on every mesh, moments lying as their parameters do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from r1re_jax.train.optimizer import OptimizerSettings, make_optimizer
from r1re_jax.train.state import (
    abstract_state,
    create_state,
    flat_params,
    model_layout,
    model_state,
    parameter_table,
    place_params,
    random_params,
)
from r1re_jax.train.update import make_programs
from tests.tiny import tiny_config, tiny_model
from tests.train.world import assert_bit_equal, layout_on, mesh_of, one_device_mesh

SPREAD = (2, 2, 2)


def test_parameters_go_flat_and_back() -> None:
    graph, state = nnx.split(tiny_model())
    flat = flat_params(state)
    assert {"embed", "head", "norm.weight", "layers.query.bias"} <= flat.keys()
    again = nnx.merge(graph, model_state(flat))
    assert_bit_equal(flat_params(nnx.state(again)), flat)


def test_only_matrices_decay() -> None:
    layout = model_layout(tiny_model(), one_device_mesh())
    matrices = {name for name, is_matrix in layout.matrices.items() if is_matrix}
    assert "layers.query.bias" not in matrices, "a stacked bias has two axes and is no matrix"
    assert matrices == {name for name in layout.shapes if "norm" not in name and "bias" not in name}


def test_moments_can_lie_on_the_host() -> None:
    layout, params = layout_on(mesh_of(*SPREAD))
    layout = dataclasses.replace(layout, moments_on_host=True)
    optimizer = make_optimizer(OptimizerSettings(), matrices=layout.matrices)
    state = create_state(place_params(params, layout), optimizer, layout)
    apply = make_programs(lambda *_: None, layout=layout, optimizer=optimizer).apply
    assert _kinds(state.opt_state) == {"pinned_host"}
    after = apply(state, jax.tree.map(jnp.ones_like, state.params))
    assert _kinds(after.opt_state) == {"pinned_host"} and _kinds(after.params) == {"device"}


def _kinds(tree: object) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_a_state_is_sharded_from_the_start() -> None:
    layout, params = layout_on(mesh_of(*SPREAD))
    optimizer = make_optimizer(OptimizerSettings(), matrices=layout.matrices)
    state = create_state(place_params(params, layout), optimizer, layout, step=7)
    assert int(state.step) == 7
    spec = state.params["layers.gate.weight"].sharding.spec
    assert spec == PartitionSpec(None, ("fsdp", "sequence"), ("tensor",))
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if getattr(path[-1], "key", None) == "layers.gate.weight"
    ]
    assert len(moments) == 2
    assert all(leaf.sharding.spec == spec for leaf in moments)
    expected = abstract_state(optimizer, layout)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), state, expected)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_placed_parameters_are_copies() -> None:
    layout, params = layout_on(one_device_mesh())
    mine = {name: jnp.asarray(value) for name, value in params.items()}
    jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)(place_params(mine, layout))
    assert_bit_equal(jax.device_get(mine), params)


def test_random_parameters_depend_on_the_seed_alone() -> None:
    config = tiny_config()
    one, many = (model_layout(tiny_model(), mesh) for mesh in (one_device_mesh(), mesh_of(*SPREAD)))
    first = jax.device_get(random_params(config, one, seed=1))
    assert_bit_equal(jax.device_get(random_params(config, many, seed=1)), first)
    other = jax.device_get(random_params(config, one, seed=2))
    assert not np.array_equal(first["embed"], other["embed"])


def test_the_table_has_every_parameter_and_adds_up() -> None:
    layout = model_layout(tiny_model(), mesh_of(*SPREAD))
    lines = parameter_table(layout).splitlines()
    assert len(lines) == len(layout.shapes) + 2
    embed = next(line for line in lines if line.startswith("embed")).split()
    assert embed[1:] == ["64×16", "vocab", "embed", "tensor", "fsdp+sequence", "4,096", "1,024"]
    total = sum(4 * int(np.prod(shape.shape)) for shape in layout.shapes.values())
    assert lines[-1].split()[1] == f"{total:,}"


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    model = tiny_model(kv_heads=1, head_size=6, query_heads=1)
    with pytest.raises(ValueError, match="does not divide 7 parameters"):
        model_layout(model, mesh_of(1, 1, 4))
