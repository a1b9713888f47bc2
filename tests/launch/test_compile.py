"""Programs compiled before a run: which, what they need, and what is refused."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1re_jax.launch.compile import compile_run
from r1re_jax.launch.needs import (
    Memory,
    Report,
    advice,
    matrix_flops,
    memory_of,
    refused,
    shown,
    summary,
)
from r1re_jax.launch.program import Text
from r1re_jax.launch.topology import CHIPS, GIB, Slice, TopologyError, tpu_slice
from tests.simulated import xla_flags
from tests.train import world

ROOT = pathlib.Path(__file__).parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_products_are_counted_as_often_as_they_run() -> None:
    one = 2 * 3 * 4 * 5

    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        _, y = jax.lax.scan(lambda c, _: (c, jnp.tanh(x @ w)), 0.0, None, length=7)

        def body(c: tuple) -> tuple:
            return c[0] + 1, jax.checkpoint(lambda z: z + x @ w)(c[1])

        return y.sum() + jax.lax.while_loop(lambda c: c[0] < 9, body, (0, x @ w))[1].sum()

    jaxpr = jax.make_jaxpr(program)(jnp.ones((3, 4)), jnp.ones((4, 5)))
    assert matrix_flops(jaxpr) == (7 + 1 + 1) * one
    assert matrix_flops(jaxpr, rounds=(3, 3)) == (7 + 9 + 1) * one


def test_collectives_are_counted_as_often_as_they_run() -> None:
    mesh = world.mesh_of(1, 4, 1)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def program(x: jax.Array) -> jax.Array:
        step = lambda _, y: y + jnp.sum(x * y.mean())  # noqa: E731
        y = jax.lax.fori_loop(0, 5, step, jnp.ones(3))
        return y, jax.lax.with_sharding_constraint(x, whole)

    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    text = jax.jit(program).lower(shape).compile().as_text()
    found = Text.of(text).collectives()
    assert found["all-reduce"] == {"count": 5, "bytes": 5 * 4, "largest": 4}
    assert found["all-gather"] == {"count": 1, "bytes": 8 * 16 * 4, "largest": 8 * 16 * 4}
    # The same where the compiler does not know how often a loop runs.
    unknown = text.replace("known_trip_count", "unknown")
    unknown = unknown.replace("direction=LT", "direction=LE")
    assert Text.of(unknown).collectives(rounds=[3])["all-reduce"]["count"] == 3


def test_memory_is_what_arrays_take() -> None:
    donated = jax.jit(lambda x, y: (x + 1, y.sum()), donate_argnums=0)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    memory = memory_of(donated.lower(floats(1000), floats(10)).compile())
    assert memory.arguments == 4000 + 40
    assert memory.outputs < 100, "the first result lies where the first argument was"
    assert memory.peak == memory.arguments + memory.temporaries + memory.outputs


def test_a_run_is_its_programs(tmp_path: pathlib.Path) -> None:
    more = {"grpo__micro_batch": 1, "grpo__compaction": 1, "evaluate__samples": 2}
    more |= {"grpo__inner_iterations": 2}
    settings = world.settings(world.write_inputs(tmp_path), **more)
    reports = {found.name: found for found in compile_run(settings, world.one_device_mesh())}
    of, limits = settings.grpo, world.LIMITS
    rows = of.questions * of.group
    decoded = [f"decode_{count}x{limits.completion}" for count in (rows, rows // 2, 1)]
    assert [name for name in reports if not name.startswith(("compact", "rows"))] == [
        *("guide_prefill", "question_prefill", "start"),
        *decoded,
        *("evaluate_guide", "evaluate_questions", "evaluate_start", "evaluate"),
        *("reference", "old", "update", "add", "apply", "sft_update", "sft_apply"),
    ]
    policy = reports["apply"].resident
    assert policy > 0, "the reference is alive while the optimizer works"
    # And counters, a few bytes.
    assert 0 <= reports["reference"].resident - 3 * policy < 100, "policy and two moments"
    held = "two moments, the reference, and what the micro-batches before have added up"
    assert 0 <= reports["update"].resident - 4 * policy < 100, held
    assert reports["update"].flops > 3 * reports["reference"].flops
    assert reports[decoded[0]].flops > 1.5 * reports[decoded[1]].flops
    assert all(report.memory.peak > 0 for report in reports.values())


def _report(peak: float, beside: float = 0.0) -> Report:
    memory = Memory(int(peak * GIB), 0, 0)
    more = {
        "flops": 10**12,
        "collectives": {"all-gather": {"count": 2, "bytes": GIB, "largest": 64}},
    }
    return Report(name="update", memory=memory, resident=int(beside * GIB), **more)


def test_what_is_alive_beside_a_program_counts() -> None:
    where = Slice("v5e:2x2", (None,) * 4, 4, CHIPS["v5e"])
    fits = summary([_report(4), _report(10, 5)], where, devices=4)
    assert (fits["fits"], fits["peak_gib_per_chip"], fits["chips"]) == (True, 15, 4)
    assert fits["programs"][1]["resident_gib"] == 5
    halves = Slice("tpu7x:2x2x1", (None,) * 8, 4, CHIPS["tpu7x"])
    found = summary([_report(90)], halves, devices=8)
    assert (found["fits"], found["hbm_gib_per_chip"]) == (True, 96), "of a device, as its peak is"
    assert fits["programs"][0]["collectives"] == {
        "all-gather": {"count": 2, "gib": 1, "largest_bytes": 64}
    }
    assert summary([_report(10, 6)], where, devices=4)["fits"] is False
    assert summary([_report(10)], None, devices=1)["fits"] is None
    assert "all-gather 2" in shown(_report(4))


def test_a_refusal_names_what_would_be_needed() -> None:
    where = Slice("v5e:2x2", (None,) * 4, 4, CHIPS["v5e"])
    says = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 27.11G of 15.75G hbm."
    found = refused(RuntimeError(says))
    assert found == {"program": None, "gib": 27.11, "says": says}
    result = summary([_report(4)], where, devices=4, refused=found)
    assert (result["fits"], result["peak_gib_per_chip"]) == (False, 27.11)
    # As libtpu 0.0.42.1 says it.
    says = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
    says += " temporaries (1.00T) exceeds available HBM (15.75G)."
    error = RuntimeError(says)
    error.add_note("update")
    assert refused(error) == {"program": "update", "gib": 1024.0, "says": says}
    assert refused(RuntimeError("INTERNAL: something else")) is None


def test_what_is_too_big_says_what_would_make_it_smaller() -> None:
    where = Slice("v5e:2x2", (None,) * 4, 4, CHIPS["v5e"])
    said = advice(summary([_report(4), _report(10, 6)], where, devices=4), where)
    assert "update needs 16.00 GiB of a device, which has 15.75 GiB" in said
    assert "half of micro_batch or micro_group" in said
    error = {"program": "decode_512x3072", "gib": None, "says": "no"}
    said = advice(summary([], where, devices=4, refused=error), where)
    assert "decode_512x3072 needs more of a device" in said and "limits.completion" in said
    error = {"program": None, "gib": 20.0, "says": "no"}
    assert "mesh.fsdp" in advice(summary([], where, devices=4, refused=error), where)


@pytest.mark.parametrize(
    ("generation", "kind", "devices", "flops", "links"),
    [
        ("v5p", "TPU v5", 4, 459e12, 600e9),
        ("v4", "TPU v4", 8, 275e12 / 2, 150e9),
        ("tpu7x", "TPU7x", 8, 2307e12 / 2, 300e9),
    ],
)
def test_rates_are_of_a_device(
    generation: str, kind: str, devices: int, flops: float, links: float
) -> None:
    """Four chips, of which the compiler shows one or two devices each."""
    shown = [SimpleNamespace(device_kind=kind)] * devices
    rates = Slice(generation, shown, 4, CHIPS[generation]).rates
    assert (rates.flops, rates.links) == (flops, links)


def test_a_slice_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"topology is 'v9:2x2'; expected GENERATION:SHAPE"):
        tpu_slice("v9:2x2")


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_a_compiler_it_is_said_how_to_get_it() -> None:
    with pytest.raises(TopologyError, match=r"docs/tpu\.md says how"):
        tpu_slice("v5e:2x2")


def test_the_command_compiles_for_what_is_here(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "programs.json"
    command = [sys.executable, "-m", "run.compile", "--config=configs/miniworld.py"]
    command += [f"--json={out}", "--config.grpo.compaction=0"]
    one_device = os.environ | {"XLA_FLAGS": xla_flags(1), "R1RE_KEEP_PROGRAMS": "0"}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": one_device}
    result = subprocess.run(command, check=False, **options)
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    found = json.loads(out.read_text())
    assert last == {name: found[name] for name in last} and last["fits"] is None
    assert {"guide_prefill", "decode_64x32", "update"} <= {one["name"] for one in found["programs"]}
    command += ["--topology=v9:1x1"]
    result = subprocess.run(command, check=False, **options)
    assert result.returncode == 1 and "expected GENERATION:SHAPE" in result.stderr
    assert "Traceback" not in result.stderr
