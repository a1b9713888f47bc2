"""run.sweep as a process: refusals, a failing member, going on, the same table after SIGKILL."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.simulated import xla_flags
from tests.train.world import config, write_inputs

ROOT = pathlib.Path(__file__).resolve().parents[1]
SWEEPS = sorted(
    path.name for path in (ROOT / "configs" / "sweeps").glob("*.py") if path.stem != "recipes"
)


def command(file: pathlib.Path | str, folder: pathlib.Path | str, *more: str) -> list[str]:
    given = [f"--config={file}", f"--workdir={folder}", *more]
    return [sys.executable, "-m", "run.sweep", *given]


def sweep(
    file: pathlib.Path | str, folder: pathlib.Path | str, *more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(file, folder, *more),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def recipe(folder: pathlib.Path, overrides: object) -> pathlib.Path:
    """A tiny recipe with a sweep."""
    file = folder / "recipe.py"
    values = config(folder, model__parity_tokens=0)
    file.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({values!r})\n"
        f"def sweep():\n    return {overrides!r}\n"
    )
    return file


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_of_the_repository_can_be_run(name: str, tmp_path: pathlib.Path) -> None:
    process = sweep(f"configs/sweeps/{name}", tmp_path / "W", "--dry-run")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) >= 6
    for line in lines:
        assert line.startswith(f"python -m run.train --config=configs/sweeps/{name} --workdir=")
    assert not (tmp_path / "W").exists()


def test_a_sweep_of_slices_is_printed_as_jobs() -> None:
    file = "configs/sweeps/kl.py:semeval_7b,v5p-8"
    more = ("--launch=tpu", "--dry-run", "--name=kl", "--tpu=--type=v5p-8", "--tpu=--spot")
    process = sweep(file, "gs://bucket/kl", *more)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("bash run/tpu.sh create --name=kl-grpo-kl-coefficient-0-0-seed-0-")
    assert lines[2].split(" -- ")[1].startswith(f"python -m run.train --config={file} --workdir=")
    assert "--workdir=gs://bucket/kl/grpo.kl_coefficient=0.0,seed=0 " in lines[2]
    assert [" --type=v5p-8 --spot" in line for line in lines] == [True, False, False] * 4


@pytest.mark.parametrize(
    ("overrides", "more", "message"),
    [
        ({"grpo.kl_coeficient": [0.0, 0.1]}, (), "did you mean grpo.kl_coefficient?"),
        ({"gropo.group": [2, 4]}, (), "did you mean grpo?"),
        ({"rewards.correct": [2.0, 3.0]}, (), "unknown key rewards; did you mean reward?"),
        ({"grpo.loss": ["grpo", "gsop"]}, (), "did you mean 'gspo'?"),
        ({"grpo.group": [2, 0.5]}, (), "flag --config.grpo.group=0.5"),
        ({"grpo.group": []}, (), "gives grpo.group an empty list"),
        ({"grpo.group": [2, 4]}, ("--config.grpo.group=8",), "the sweep sets grpo.group itself"),
        ({"seed": [0, 1]}, ("--config.grpo.gruop=8",), "did you mean grpo.group?"),
        ({"seed": [0, 1]}, ("--score=held/f1",), "expected SET/METRIC, one of the sets held"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_anything_is(
    overrides: object, more: tuple[str, ...], message: str, tmp_path: pathlib.Path
) -> None:
    process = sweep(recipe(tmp_path, overrides), tmp_path / "W", *more)
    assert process.returncode == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "W").exists()


def test_a_failing_member_stops_no_other_and_is_tried_again(tmp_path: pathlib.Path) -> None:
    write_inputs(tmp_path)
    paths = [str(tmp_path / "missing.jsonl"), str(tmp_path / "train.jsonl")]
    file = recipe(tmp_path, {"data.train.path": paths})
    process = sweep(file, tmp_path / "W", "--jobs=2")
    assert process.returncode == 1, process.stderr
    assert "1 of 2 failed: data.train.path=" in process.stderr
    assert "run.train: " in process.stderr, "the end of its log"
    assert "missing.jsonl" in process.stderr
    with open(tmp_path / "W" / "sweep.csv") as lines:
        assert [row["state"] for row in csv.DictReader(lines)] == ["failed (1)", "done"]
    done = next((tmp_path / "W").glob("*/metrics.jsonl"))
    before = done.stat().st_mtime_ns, done.read_bytes()

    (tmp_path / "missing.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    process = sweep(file, tmp_path / "W")
    assert process.returncode == 0, process.stderr
    assert "[sweep 1/2 done]" in process.stderr and "1 of 2 members to run" in process.stderr
    assert before == (done.stat().st_mtime_ns, done.read_bytes()), "nothing is done twice"

    table = (tmp_path / "W" / "sweep.csv").read_text()
    (tmp_path / "W" / "sweep.csv").unlink()
    process = sweep(file, tmp_path / "W", "--launch=none")
    assert process.returncode == 0, process.stderr
    assert process.stderr == "" and process.stdout.startswith("# Sweep W\n")
    assert (tmp_path / "W" / "sweep.csv").read_text() == table

    process = sweep(file, tmp_path / "W", "--config.sft.learning_rate=0.5")
    assert process.returncode == 1
    assert "sft.learning_rate is 0.01 there and 0.5 here" in process.stderr
    process = sweep(recipe(tmp_path, {"data.train.path": paths[:1]}), tmp_path / "W")
    assert process.returncode == 1
    assert "members that the sweep does not have any more: data.train.path=" in process.stderr


def test_a_signal_reaches_members_and_the_printed_command_goes_on(tmp_path: pathlib.Path) -> None:
    write_inputs(tmp_path)
    file = recipe(tmp_path, {"seed": [0, 1]})
    more = ("--config.grpo.steps=100000", "--config.checkpoint.every=0")
    process = subprocess.Popen(
        command(file, tmp_path / "W", *more),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    numbers = tmp_path / "W" / "seed=0" / "metrics.jsonl"
    _until(lambda: numbers.exists() and '"step": 3' in numbers.read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "SIGINT: stopped. Resume with: " in err
    log = (tmp_path / "W" / "seed=0" / "train.log").read_text()
    assert "SIGINT: stopped after step" in log
    assert list((tmp_path / "W" / "seed=0" / "checkpoints").iterdir()), "it saved"
    assert not (tmp_path / "W" / "seed=1").exists()
    with open(tmp_path / "W" / "sweep.csv") as lines:
        assert [row["state"] for row in csv.DictReader(lines)] == ["unfinished", "not begun"]


def _until(reached: Callable[[], bool], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not reached() and time.monotonic() < ends:
        time.sleep(0.05)
    assert reached()


def _steps(folder: pathlib.Path) -> int:
    """Lines that members have written."""
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("*/metrics.jsonl"))


def _kill_after(folder: pathlib.Path, steps: int) -> None:
    """Start the smoke sweep and end it and its members with SIGKILL after so many new steps."""
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            command("configs/sweeps/smoke.py", folder, "--jobs=2"),
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": xla_flags(1)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    before = _steps(folder)
    _until(lambda: _steps(folder) >= before + steps or process.poll() is not None)
    assert process.poll() is None, "killed in its midst"
    members = _children(process.pid)
    for pid in (process.pid, *members):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert len(members) == 2


def _children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task")
    return [int(one) for path in tasks.glob("*/children") for one in path.read_text().split()]


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_gives_the_table_of_one_that_was_not(
    tmp_path: pathlib.Path,
) -> None:
    whole = sweep("configs/sweeps/smoke.py", tmp_path / "whole", "--jobs=2")
    assert whole.returncode == 0, whole.stderr
    _kill_after(tmp_path / "killed", 2)
    _kill_after(tmp_path / "killed", 7)
    process = sweep("configs/sweeps/smoke.py", tmp_path / "killed", "--jobs=2")
    assert process.returncode == 0, process.stderr
    assert "[sweep 0/6 done]" not in process.stderr, "what was done is not done again"

    tables = []
    for name in ("whole", "killed"):
        with open(tmp_path / name / "sweep.csv") as lines:
            rows = list(csv.DictReader(lines))
        assert [row["state"] for row in rows] == ["done"] * 6
        assert all(float(row.pop("seconds")) > 0 for row in rows)
        tables.append(rows)
    assert tables[0] == tables[1]
    pages = [(tmp_path / name / "sweep.md").read_text() for name in ("whole", "killed")]
    pages = [
        [line.rpartition("| done |")[0] or line for line in page.splitlines()] for page in pages
    ]
    assert pages[0][1:] == pages[1][1:]
    for folder in (tmp_path / "killed").glob("grpo*"):
        text = (folder / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        assert steps == [1, 2, 3]
