"""What a run holds on each device, counted from its settings."""

import dataclasses
import pathlib

import pytest

from r1re_jax.launch.holdings import Holdings, HoldingsError, held
from r1re_jax.launch.topology import GIB
from r1re_jax.train.start import abstract_model
from tests.train import world


@pytest.fixture
def inputs(tmp_path: pathlib.Path) -> pathlib.Path:
    """Write a policy and data."""
    return world.write_inputs(tmp_path)


def test_what_a_run_holds_is_counted(inputs: pathlib.Path) -> None:
    mesh = world.one_device_mesh()
    found = held(world.settings(inputs, grpo__micro_batch=1), mesh)
    assert found.reference == found.policy, "float32 both"
    assert found.gradient == 2 * found.policy, "what is added up, and a micro-batch's own"
    assert 0 <= found.moments - 2 * found.policy < 100
    assert found.copy == 0, "one device draws with the policy itself"
    config = abstract_model(world.settings(inputs)).config
    token = 2 * config.layers * config.kv_heads * config.head_size * 4
    assert found.cache == 2 * 2 * world.LIMITS.completion * token
    assert found.drawing == found.policy + found.moments + found.reference + found.cache
    assert found.updating == found.policy + found.moments + found.reference + found.gradient


def test_bfloat16_and_int8_take_less(inputs: pathlib.Path) -> None:
    mesh, model = world.one_device_mesh(), {"path": str(inputs / "base"), "dtype": "bfloat16"}
    whole = held(world.settings(inputs), mesh)
    less = held(world.settings(inputs, model=model, grpo__first_moment="bfloat16"), mesh)
    assert (less.reference, less.cache, less.copy) == (
        whole.reference // 2,
        whole.cache // 2,
        whole.policy // 2,
    )
    assert 0 <= less.moments - 1.5 * whole.policy < 100
    quantised = {"cache": "int8"}
    assert held(world.settings(inputs, grpo__quantise=quantised), mesh).cache == whole.cache // 4


def test_what_lies_on_the_host_takes_none(inputs: pathlib.Path) -> None:
    mesh = world.one_device_mesh()
    away = {"moments_on_host": True, "reference_on_host": True}
    whole, less = held(world.settings(inputs), mesh), held(world.settings(inputs, mesh=away), mesh)
    assert less.reference == 0 < whole.reference and less.moments < 100 < whole.moments
    with pytest.raises(ValueError, match="reference_on_host is for a frozen reference"):
        world.settings(inputs, mesh=away, grpo__reference={"every": 1})


def test_a_warm_start_alone_draws_nothing(inputs: pathlib.Path) -> None:
    found = held(world.settings(inputs, grpo__steps=0), world.one_device_mesh())
    assert found.cache == found.copy == found.reference == 0


def test_what_cannot_fit_is_refused_with_what_could_be_done() -> None:
    found = Holdings(policy=2 * GIB, moments=4 * GIB, cache=GIB)
    found.check(None)
    found.check(7 * GIB)
    more = dataclasses.replace(found, reference=GIB)
    with pytest.raises(HoldingsError, match=r"holds 8.00 GiB on each device, which has 7.00.*fsdp"):
        more.check(7 * GIB)
    assert more.facts()["while drawing"] == "8.000 GiB" and "copy" not in more.facts()
