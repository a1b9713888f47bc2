"""Two processes of four devices are one run of eight: the same samples, updates and files."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from r1re_jax import files, hosts
from r1re_jax.files import place
from tests.fake_gcs import FakeGCS
from tests.simulated import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
# Three steps with an evaluation, of a policy whose rewards differ, for eight devices.
CONFIG = """
from configs import arguments, miniworld

CHANGES = {
    "sft.steps": 1, "sft.trees": 1, "sft.questions": 8,
    "grpo.steps": 2, "grpo.trees": 1, "grpo.questions": 8,
    "mesh.fsdp": 4, "mesh.sequence": 2, "mesh.drawing_tensor": 2,
    "evaluate.batch": 8, "evaluate.greedy": False, "log.completions": 1,
    "data.train.limits": {"guide": 320, "question": 64, "completion": 24},
    "limits.completion": 24,
}


def get_config():
    config = miniworld.get_config("smoke")
    arguments.put(config, CHANGES)
    del config.data.eval.ood, config.data.eval.ood_shuffled
    return config
"""


def start(
    config: pathlib.Path, workdir: pathlib.Path | str, **environment: str
) -> subprocess.Popen:
    """Start the command in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", "run.train", f"--config={config}", f"--workdir={workdir}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu", "R1RE_KEEP_PROGRAMS": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def devices(count: int) -> dict[str, str]:
    """Return what makes a process see so many devices."""
    return {"XLA_FLAGS": xla_flags(count)}


def two(address: str, number: int, **more: str) -> dict[str, str]:
    """Return the environment of one of two processes."""
    shared = {hosts.COORDINATOR: address, hosts.COUNT: "2", hosts.NUMBER: str(number)}
    return shared | devices(4) | more


def free_address() -> str:
    """Return an address of this machine that nobody listens at, nor at the next port."""
    while True:
        with socket.socket() as found, socket.socket() as following:
            found.bind(("", 0))
            port = found.getsockname()[1]
            try:
                following.bind(("", port + 1))
            except OSError:
                continue
            return f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Write the config."""
    path = tmp_path_factory.mktemp("inputs") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def runs(
    config: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, gcs: FakeGCS
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Train once in one process, and once in two that share a bucket."""
    folder, address = tmp_path_factory.mktemp("runs"), free_address()
    alone = start(config, folder / "one", **devices(8))
    said = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, said
    gcs.buckets["hosts"] = {}
    both = [start(config, "gs://hosts/two", **two(address, number)) for number in (0, 1)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert all("[grpo 3/3]" in lines for lines in said), "each tells in its own log that it works"
    with files.fetched(place("gs://hosts/two")) as fetched:
        yield folder / "one", fetched


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_two_processes_draw_the_same_samples(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    one, other = runs
    names = sorted(path.relative_to(one) for path in one.glob("completions/*.jsonl"))
    assert len(names) == 2
    names += sorted(path.relative_to(one) for path in one.glob("eval/*/predictions.jsonl"))
    assert len(names) > 2
    for name in names:
        for row, same in zip(lines(one / name), lines(other / name), strict=True):
            assert [s["text"] for s in row["samples"]] == [s["text"] for s in same["samples"]]
            assert [s["reward"] for s in row["samples"]] == [s["reward"] for s in same["samples"]]


@pytest.mark.slow
def test_two_processes_make_the_same_updates(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    one, other = (lines(folder / "metrics.jsonl") for folder in runs)
    assert [line["step"] for line in other] == [line["step"] for line in one]
    for line, same in zip(one, other, strict=True):
        assert line.keys() == same.keys()
        names = {"loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length"}
        for name in names & line.keys():
            np.testing.assert_allclose(same[name], line[name], rtol=1e-5, atol=1e-7)
    assert all(line["reward_std"] > 0 for line in one if "reward" in line), "there is a gradient"
    steps = [sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in runs]
    assert steps[0] == steps[1]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = two(f"127.0.0.1:{port - 1}", 0)
        with pytest.raises(hosts.HostsError, match=f"cannot listen at port {port}: .*in use"):
            hosts.join(environment)


def test_a_process_that_does_not_come_is_named(
    config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    short = {hosts.TIMEOUT: "5"}
    first = start(config, tmp_path / "w", **two(free_address(), 0, **short))
    said = first.communicate(timeout=120)[0]
    assert first.returncode not in (0, None)
    assert "process 1" in said and hosts.TIMEOUT in said, said
    assert not (tmp_path / "w").exists(), "nothing was written"


def test_a_first_process_that_does_not_listen_is_named(
    config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    address = free_address()
    second = start(config, tmp_path / "w", **two(address, 1, **{hosts.TIMEOUT: "3"}))
    said = second.communicate(timeout=120)[0]
    assert second.returncode not in (0, None)
    assert f"process 0 of 2, which is to listen at {address}" in said, said


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({hosts.COUNT: "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not"),
        (
            {hosts.COORDINATOR: "a:1", hosts.COUNT: "2", hosts.NUMBER: "2"},
            "JAX_PROCESS_ID is 2; there are 2 processes",
        ),
    ],
)
def test_what_is_set_by_halves_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(hosts.HostsError, match=message):
        hosts.join(environment)


def test_one_process_joins_nobody_and_has_all() -> None:
    hosts.join({hosts.TPU_HOSTS: "localhost"})
    assert hosts.is_first() and list(hosts.mine(5)) == [0, 1, 2, 3, 4]
    assert hosts.exchange([{"a": 1}, None]) == [{"a": 1}, None]
    assert hosts.agreed(15) == 15


def test_shares_are_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(list(hosts.mine(8)))
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]
