"""run/tpu_worker.sh, which a slice's workers run: tmux is real, the metadata server is not."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEW, OLD = "10.0.0.5,10.0.0.6", "n:1:10.0.0.5,n:2:10.0.0.6"
OTHERS = 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"'


class Worker:
    """A worker's home folder, and a tmux that nobody else uses."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Make the folder; without endpoints there is no metadata server."""
        self.home = folder / "r1re"
        self.home.mkdir()
        tools = folder / "bin"
        tools.mkdir()
        # curl of tests: a file named as the last part of the address.
        curl = '#!/bin/sh\nfor a in "$@"; do :; done\nexec cat "$METADATA/${a##*/}" 2>/dev/null\n'
        (tools / "curl").write_text(curl)
        (tools / "curl").chmod(0o755)
        self.metadata = folder / "metadata"
        self.metadata.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TMUX"))}
        self.environment = kept | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(folder),
            "METADATA": str(self.metadata),
            "TMUX_TMPDIR": str(folder),
            "R1RE_WORKER_PATIENCE": "20",
        }

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Call the script."""
        return subprocess.run(
            ["bash", ROOT / "run" / "tpu_worker.sh", *arguments],
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def state(self) -> str:
        """Return what it says of itself, without its name."""
        mark, _, *words = self.run("state").stdout.split()
        assert mark == "r1re-worker"
        return " ".join(words)

    def settled(self) -> str:
        """Return the state once nothing runs."""
        until = time.monotonic() + 30
        while (state := self.state()) == "running" and time.monotonic() < until:
            time.sleep(0.05)
        return state


@pytest.fixture
def worker(tmp_path: pathlib.Path) -> Worker:
    """One, alone."""
    return Worker(tmp_path)


@pytest.mark.parametrize("listed", [NEW, OLD], ids=["addresses", "triples"])
def test_the_workers_of_a_slice_are_told_about_each_other(worker: Worker, listed: str) -> None:
    (worker.metadata / "worker-network-endpoints").write_text(listed)
    (worker.metadata / "agent-worker-number").write_text("1")
    result = worker.run("exec", "--", "bash", "-c", OTHERS)
    assert result.stdout.split() == ["10.0.0.5:8476", "2", "1"], result.stderr
    given = dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="2")
    result = worker.run("exec", "--", "bash", "-c", OTHERS, **given)
    assert result.stdout.split() == ["h:1", "3", "2"]


@pytest.mark.parametrize("listed", ["10.0.0.5", None], ids=["one host", "no metadata"])
def test_a_single_host_is_told_nothing(worker: Worker, listed: str | None) -> None:
    if listed:
        (worker.metadata / "worker-network-endpoints").write_text(listed)
    result = worker.run("exec", "--", "bash", "-c", OTHERS)
    assert result.returncode == 0 and not result.stdout.split()


def test_empty_variables_are_as_none(worker: Worker) -> None:
    script = 'echo "${HF_TOKEN-none} ${WANDB_API_KEY-none}"'
    result = worker.run("exec", "--", "bash", "-c", script, HF_TOKEN="", WANDB_API_KEY="k")
    assert result.stdout.split() == ["none", "k"]


@pytest.mark.parametrize("arguments", [[], ["begin"], ["start", "x"], ["exec", "--"]])
def test_what_is_not_understood_is_refused(worker: Worker, arguments: list[str]) -> None:
    result = worker.run(*arguments)
    assert result.returncode == 1 and "[worker]" in result.stderr


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_run_goes_on_by_itself_and_ends_with_its_status(worker: Worker) -> None:
    assert worker.state() == "idle"
    (worker.home / "env").write_text("export HF_TOKEN='a b'\n")
    script = 'echo "token $HF_TOKEN, $1"; exit 3'
    result = worker.run("start", "--", "bash", "-c", script, "-", "it's one word")
    assert result.returncode == 0, result.stderr
    assert worker.settled() == "ended 3"
    assert "token a b, it's one word" in (worker.home / "log").read_text()
    assert not (worker.home / "env").exists(), "secrets are read once"


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_second_run_replaces_the_first_only_when_told_to(worker: Worker) -> None:
    script = 'trap "echo saved; exit 143" TERM; echo begun; while :; do sleep 0.05; done'
    assert worker.run("start", "--", "bash", "-c", script).returncode == 0
    log = worker.home / "log"
    until = time.monotonic() + 30
    while not (log.exists() and "\nbegun" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert worker.state() == "running"
    (worker.home / "env").write_text("")
    refused = worker.run("start", "--", "true")
    assert refused.returncode == 1 and "a run goes on here already" in refused.stderr
    assert not (worker.home / "env").exists()
    assert worker.run("start", "--replace", "--", "true").returncode == 0
    assert worker.settled() == "ended 0"
    assert "saved" in log.read_text(), "the first was asked to end, and not killed"


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_session_that_went_without_a_word_is_lost(worker: Worker) -> None:
    assert worker.run("start", "--", "sleep", "60").returncode == 0
    pid = worker.home / "pid"
    while not pid.exists():
        time.sleep(0.05)
    subprocess.run(["tmux", "kill-server"], env=worker.environment, check=True)
    assert worker.state() == "lost"
    subprocess.run(["kill", "-KILL", pid.read_text().strip()], check=False)
