"""Members as processes: so many at a time, signals passed on, none left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence

from r1re_jax.launch.members import Job, last_lines, run_jobs

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Heard:
    """A watcher that remembers, and how many ran at a time."""

    def __init__(self) -> None:
        self.began_names: list[str] = []
        self.said: dict[str, list[str]] = {}
        self.most = 0

    def began(self, job: Job) -> None:
        self.began_names.append(job.name)

    def ended(self, job: Job, code: int, said: Sequence[str]) -> None:
        self.said[job.name] = list(said)

    def beat(self, running: Sequence[Job]) -> None:
        self.most = max(self.most, len(running))


def shell(folder: pathlib.Path, name: str, script: str) -> Job:
    return Job(name=name, command=("sh", "-c", script), log=folder / name / "train.log")


def until(path: pathlib.Path, seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.02)
    assert path.exists()


def test_one_that_fails_does_not_stop_the_others(tmp_path: pathlib.Path) -> None:
    jobs = [
        shell(tmp_path, "a", "echo one; sleep 0.3"),
        shell(tmp_path, "b", "echo wrong >&2; exit 3"),
        shell(tmp_path, "c", "kill -9 $$"),
        shell(tmp_path, "d", "true"),
    ]
    heard = Heard()
    codes = dict(run_jobs(jobs, at_once=2, asked=lambda: None, watcher=heard))
    assert codes == {"a": 0, "b": 3, "c": 128 + 9, "d": 0}
    assert heard.began_names == ["a", "b", "c", "d"]
    assert heard.said["b"] == ["wrong"]
    assert heard.most <= 2


def test_a_log_goes_on_and_its_earlier_words_are_not_told_again(tmp_path: pathlib.Path) -> None:
    for words in ("before", "after"):
        heard = Heard()
        job = shell(tmp_path, "a", f"echo {words}; exit 1")
        assert dict(run_jobs([job], at_once=1, asked=lambda: None, watcher=heard)) == {"a": 1}
        assert heard.said["a"] == [words]
    assert (tmp_path / "a" / "train.log").read_text() == "before\nafter\n"


def test_a_request_to_stop_is_passed_on_once_and_nothing_more_begins(
    tmp_path: pathlib.Path,
) -> None:
    script = (
        f"trap 'echo saved; exit 143' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    )
    jobs = [shell(tmp_path, "a", script), shell(tmp_path, "b", "true")]
    heard = Heard()

    def asked() -> int | None:
        return signal.SIGTERM if (tmp_path / "ready").exists() else None

    codes = dict(run_jobs(jobs, at_once=1, asked=asked, watcher=heard))
    assert codes == {"a": 143}
    assert heard.said["a"] == ["saved"]


def test_members_of_a_sweep_that_is_killed_are_told_to_save(tmp_path: pathlib.Path) -> None:
    member = f"trap 'touch {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/ready;"
    member += " while :; do sleep 0.05; done"
    program = f"""
        import pathlib
        from r1re_jax.launch.members import Job, run_jobs
        from tests.launch.test_members import Heard
        log = pathlib.Path({str(tmp_path / "log")!r})
        job = Job(name="a", command=("sh", "-c", {member!r}), log=log)
        list(run_jobs([job], at_once=1, asked=lambda: None, watcher=Heard()))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    until(tmp_path / "ready", 60)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(tmp_path / "saved")


def test_last_lines_are_the_ends_of_long_logs(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    assert last_lines(path) == []
    path.write_text("".join(f"line {i}\n\n" for i in range(9999)))
    assert last_lines(path, count=2) == ["line 9997", "line 9998"]
    assert last_lines(path, since=path.stat().st_size) == []
