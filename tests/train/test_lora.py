"""Adapters in training: where they begin, what a step changes and what it costs."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from r1re_jax.model.lora import Lora, adapt
from r1re_jax.model.qwen import abstract_qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy_files import load_policy
from r1re_jax.policy_source import named_params
from r1re_jax.rl.correction import LOGP_DIFFERENCE
from r1re_jax.task import tasks
from r1re_jax.train.config import read_settings
from r1re_jax.train.grpo import make_grpo
from r1re_jax.train.optimizer import OptimizerSettings, make_optimizer
from r1re_jax.train.settings import GRPOSettings, SFTSettings
from r1re_jax.train.sft import SFTBlock, make_sft
from r1re_jax.train.start import abstract_model, load_start, policy_of
from r1re_jax.train.state import (
    Layout,
    Params,
    abstract_state,
    create_state,
    fresh_adapter,
    model_layout,
    no_adapter,
    parameter_bytes,
    parameter_table,
)
from r1re_jax.train.update import StepResult
from tests.tiny import tiny_config, tiny_policy
from tests.train import world
from tests.train.world import assert_bit_equal, mesh_of, one_device_mesh, some_verdict

LORA = Lora(rank=2, alpha=8.0)
RATE = 0.05
SPREAD = (2, 2, 2)
SHORT = dataclasses.replace(world.LIMITS, completion=12)


@pytest.fixture(autouse=True, scope="module")
def _spread_rewards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "relation_reward", some_verdict)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return world.write_inputs(tmp_path_factory.mktemp("inputs"))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _layout(mesh: jax.sharding.Mesh, lora: Lora = LORA) -> tuple[Layout, Params]:
    """The tiny policy's layout with adapters, and the frozen arrays where they belong."""
    policy = tiny_policy()
    layout = model_layout(adapt(abstract_qwen(policy.config), lora), mesh)
    params = named_params(policy.model)
    return layout, {n: jax.device_put(params[n], x.sharding) for n, x in layout.frozen.items()}


def _stirred(layout: Layout) -> Params:
    """Adapters with B that is not zero."""
    adapter = fresh_adapter(layout, seed=3)
    other = fresh_adapter(layout, seed=4)
    turned = lambda name, x: x + 0.1 * jnp.ones_like(x) if name.endswith("b") else other[name]  # noqa: E731
    return {name: turned(name, value) for name, value in adapter.items()}


# Where an adapter begins.


def test_a_is_drawn_from_the_seed_and_b_is_zero() -> None:
    (one, _), (many, _) = _layout(one_device_mesh()), _layout(mesh_of(*SPREAD))
    first = jax.device_get(fresh_adapter(one, seed=1))
    assert_bit_equal(jax.device_get(fresh_adapter(many, seed=1)), first)
    other = jax.device_get(fresh_adapter(one, seed=2))
    some, _ = _layout(one_device_mesh(), dataclasses.replace(LORA, targets=r"layers\.up\.weight"))
    part = jax.device_get(fresh_adapter(some, seed=1))
    assert part.keys() == {"layers.up.adapter.a", "layers.up.adapter.b"}
    assert_bit_equal(part, {name: first[name] for name in part})
    for name, value in first.items():
        assert value.any() == name.endswith("a")
        assert np.array_equal(value, other[name]) == name.endswith("b")
    assert not any(value.any() for value in jax.device_get(no_adapter(one)).values())
    wide = Lora(rank=64)
    layout = model_layout(
        adapt(abstract_qwen(tiny_config(width=128, mlp_width=96)), wide), one_device_mesh()
    )
    drawn = jax.device_get(fresh_adapter(layout, seed=0))
    for name, inputs in (("up", 128), ("down", 96)):
        assert drawn[f"layers.{name}.adapter.a"].std() == pytest.approx((3 * inputs) ** -0.5, 0.05)


def test_adapters_lie_as_their_matrices_do_and_ranks_are_whole() -> None:
    layout, _ = _layout(mesh_of(*SPREAD))
    found = {name: where.spec for name, where in layout.shardings.items() if "query" in name}
    assert found["layers.query.adapter.a"] == P(None, ("fsdp", "sequence"), None)
    assert found["layers.query.adapter.b"] == P(None, None, ("tensor",))
    assert layout.shardings["layers.down.adapter.a"].spec == P(None, ("tensor",), None)
    assert layout.shardings["layers.down.adapter.b"].spec == P(None, None, ("fsdp", "sequence"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_begins_as_its_base_bit_by_bit(inputs: pathlib.Path, dtype: str) -> None:
    values = world.config(inputs, model__dtype=dtype) | {"lora": vars(LORA)}
    start = load_start(read_settings(values), mesh=one_device_mesh(), guides=(), fresh=True)
    assert {str(x.dtype) for x in start.frozen.values()} == {dtype}
    assert {str(x.dtype) for x in start.params.values()} == {"float32"}
    rows = [[1, 2, 3, 4, 5], [6]]
    ours = policy_of(start, start.params).logits(rows)
    for one, other in zip(
        ours, load_policy(inputs / "base", dtype=dtype).logits(rows), strict=True
    ):
        np.testing.assert_array_equal(one, other, strict=True)


# Steps.


def _sft(mesh: tuple[int, int, int], *, steps: int) -> tuple[list[StepResult], Params]:
    settings = SFTSettings(
        steps=steps, questions=4, cycle=1, optimizer=OptimizerSettings(learning_rate=RATE)
    )
    layout, frozen = _layout(mesh_of(*mesh))
    phase = make_sft(
        settings,
        limits=world.LIMITS,
        encoder=tiny_policy().encoder,
        source=world.source(trees=1, questions=4),
        layout=layout,
        frozen=frozen,
    )
    state, results = create_state(_stirred(layout), phase.optimizer, layout), []
    for number in range(1, steps + 1):
        result = phase.step(state, number, tick=lambda note: None)
        state = result.state
        results.append(dataclasses.replace(result, state=None))
    results[-1] = dataclasses.replace(results[-1], state=jax.device_get(state))
    assert phase.programs.gradient._cache_size() == phase.programs.apply._cache_size() == 1
    return results, frozen


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    results, frozen = _sft((1, 1, 1), steps=6)
    losses = [result.metrics["loss"] for result in results]
    assert losses[-1] < losses[0] - 0.5, losses
    layout, before = _layout(one_device_mesh())
    assert_bit_equal(jax.device_get(frozen), jax.device_get(before))
    moved = results[-1].state.params
    was = jax.device_get(_stirred(layout))
    assert all((moved[name] != was[name]).any() for name in was)


def test_a_mesh_changes_no_sft_step() -> None:
    (one,), _ = _sft((1, 1, 1), steps=1)
    (many,), _ = _sft(SPREAD, steps=1)
    assert many.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
    assert many.metrics["grad_norm"] == pytest.approx(one.metrics["grad_norm"], rel=1e-4)
    for name, value in one.state.params.items():
        np.testing.assert_allclose(many.state.params[name], value, atol=2e-5, err_msg=name)


def _grpo(mesh: tuple[int, int, int]) -> StepResult:
    settings = GRPOSettings(
        steps=1,
        questions=4,
        group=2,
        chunk=16,
        kl_coefficient=0.1,
        optimizer=OptimizerSettings(learning_rate=RATE),
    )
    layout, frozen = _layout(mesh_of(*mesh))
    phase = make_grpo(
        settings,
        limits=SHORT,
        encoder=tiny_policy().encoder,
        source=world.source(trees=1, questions=4),
        seed=5,
        first=0,
        layout=layout,
        reference={**frozen, **no_adapter(layout)},
        frozen=frozen,
    )
    state = create_state(_stirred(layout), phase.optimizer, layout)
    result = phase.step(state, 1, tick=lambda note: None)
    assert not any(leaf.is_deleted() for leaf in frozen.values()), "the base is never donated"
    return dataclasses.replace(result, state=jax.device_get(result.state))


def test_a_mesh_changes_no_grpo_step() -> None:
    one, many = _grpo((1, 1, 1)), _grpo(SPREAD)
    texts = [[[s["text"] for s in row["samples"]] for row in x.completions] for x in (one, many)]
    assert texts[0] == texts[1]
    for name in ("loss", "grad_norm", "kl", "reward", "entropy"):
        assert many.metrics[name] == pytest.approx(one.metrics[name], rel=1e-4), name
    assert one.metrics["kl"] > 0, "the reference is the base"
    assert one.metrics[f"{LOGP_DIFFERENCE}/max"] < 1e-4, "sampler and trainer agree"
    for name, value in one.state.params.items():
        np.testing.assert_allclose(many.state.params[name], value, atol=5e-5, err_msg=name)


# What it costs.


def test_state_gradient_and_donated_buffers_are_of_the_adapters_size() -> None:
    layout, frozen = _layout(one_device_mesh())
    adapter = fresh_adapter(layout, seed=0)
    count = sum(2 * 2 * (inputs + outputs) for inputs, outputs in _matrices())
    assert (
        _bytes(adapter) == 4 * count == parameter_bytes(dataclasses.replace(layout, frozen={}))[0]
    )
    optimizer = make_optimizer(OptimizerSettings(vector_scale=9.0), matrices=layout.matrices)
    assert all(layout.matrices.values()), "an adapter has no vectors"
    state = create_state(adapter, optimizer, layout)
    counters = 4 * sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state))
    assert _bytes(state) == 3 * _bytes(adapter) + counters, "weights and two moments"
    shapes = jax.tree.leaves(abstract_state(optimizer, layout))
    assert sum(x.size * x.dtype.itemsize for x in shapes) == _bytes(state)
    assert parameter_bytes(layout)[0] == _bytes(adapter) + _bytes(frozen)


def _matrices() -> list[tuple[int, int]]:
    """Inputs and outputs of the tiny model's matrices: q, k, v, o, gate, up, down."""
    return [(16, 32), (16, 16), (16, 16), (32, 16), (16, 32), (16, 32), (32, 16)]


def test_no_gradient_of_the_bases_size_exists_in_the_compiled_update() -> None:
    # More layers than are unrolled: what is needed of one layer alone is there once.
    config = tiny_config(width=256, mlp_width=512, vocab=300, layers=12)
    tokens = Level(np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    below = Level(np.zeros((1, 1, 1), np.int32), np.ones((1, 1), np.int32))
    leaf = Level(np.zeros((1, 1, 1, 1), np.int32), np.ones((1, 1, 1), np.int32))
    block = SFTBlock(Tree(tokens, below, leaf), np.float32(1))
    sizes = {}
    for rank in (0, 2):
        model = abstract_qwen(config)
        layout = model_layout(adapt(model, Lora(rank=rank)) if rank else model, one_device_mesh())
        phase = make_sft(
            SFTSettings(steps=1, questions=1),
            limits=world.LIMITS,
            encoder=tiny_policy().encoder,
            source=world.source(trees=1, questions=1),
            layout=layout,
        )
        lowered = phase.programs.gradient.lower(dict(layout.shapes), dict(layout.frozen), block)
        sizes[rank] = lowered.compile().memory_analysis()
        apply = phase.programs.apply.lower(
            abstract_state(phase.optimizer, layout), dict(layout.shapes)
        )
        donated = apply.compile().memory_analysis().alias_size_in_bytes
        own = parameter_bytes(dataclasses.replace(layout, frozen={}))[0]
        assert own * 3 <= donated <= own * 3 + 1000
        assert sizes[rank].output_size_in_bytes <= own + 1000
    matrices = 12 * 4 * (256 * (32 + 2 * 16) + 32 * 256 + 3 * 256 * 512)
    all_of_it, ours = (x.output_size_in_bytes + x.temp_size_in_bytes for x in sizes.values())
    assert all_of_it > matrices
    assert ours < matrices / 4


def test_a_table_tells_what_is_trained(inputs: pathlib.Path) -> None:
    settings = read_settings(world.config(inputs) | {"lora": vars(LORA)})
    layout = model_layout(abstract_model(settings), one_device_mesh())
    lines = parameter_table(layout).splitlines()
    assert len(lines) == 1 + len(layout.frozen) + len(layout.shapes) + 2
    trained, total = (line.split() for line in lines[-2:])
    assert trained[0] == "trained" and total[0] == "total"
    assert trained[1] == f"{parameter_bytes(dataclasses.replace(layout, frozen={}))[0]:,}"
    assert total[1] == f"{parameter_bytes(layout)[0]:,}"
    a = next(line.split() for line in lines if line.startswith("layers.up.adapter.a"))
    assert a[1:] == ["2×16×2", "embed", "rank", "-", "fsdp+sequence", "-", "256", "256"]
