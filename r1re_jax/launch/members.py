"""The members of a sweep as processes: so many at a time, stopped and ended with the sweep.

A member is in a process group of its own, so that Ctrl-C in a terminal reaches the sweep alone,
which passes it on once: a second signal would end run.train at once. Where the sweep is killed the
kernel sends its members SIGTERM, and they save.
"""

import collections
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TICK_SECONDS = 0.1
# Becomes the command, to be sent SIGTERM when the process that started it is no more (1 is
# PR_SET_PDEATHSIG of prctl(2)). In Python's own fork jax would warn of its threads.
_TIED = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,15);"
    "os.getppid()==int(sys.argv[1]) and os.execvp(sys.argv[2],sys.argv[2:])"
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process to run.

    Attributes:
        name: of the member.
        command: and its arguments.
        log: file that takes what it says, behind what is there.
    """

    name: str
    command: tuple[str, ...]
    log: Path


class Watcher(Protocol):
    """What hears of jobs."""

    def began(self, job: Job) -> None:
        """A process runs."""

    def ended(self, job: Job, code: int, said: Sequence[str]) -> None:
        """It has ended; `said` are the last lines of its log."""

    def beat(self, running: Sequence[Job]) -> None:
        """Time goes by; called several times a second."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    at_once: int,
    asked: Callable[[], int | None],
    watcher: Watcher,
    keep_open: Sequence[int] = (),
) -> Iterator[tuple[str, int]]:
    """Run processes to their ends, so many at a time; one that fails does not stop the others.

    Args:
        jobs: in the order in which they begin.
        at_once: how many.
        asked: signal that asks to stop, or None. It is passed on, and no further job begins.
        watcher: hears what happens.
        keep_open: file descriptors that the processes get, see `sweep_folder.locked`.

    Yields:
        Name and exit status of each that has ended, 128 + signal where one ended it.
    """
    waiting, running = collections.deque(jobs), {}
    told = None
    while running or (waiting and told is None):
        if told is None and (told := asked()) is not None:
            for process, _ in running.values():
                process.send_signal(told)
        while waiting and len(running) < at_once and told is None:
            job = waiting.popleft()
            running[job] = _start(job, keep_open)
            watcher.began(job)
        for job, (process, offset) in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[job]
                status = 128 - code if code < 0 else code
                watcher.ended(job, status, last_lines(job.log, since=offset))
                yield job.name, status
        watcher.beat(tuple(running))
        time.sleep(TICK_SECONDS)


def last_lines(path: Path, *, since: int = 0, count: int = 12) -> list[str]:
    """Return the last lines of a file that are not blank, from a byte on."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(since, file.seek(0, os.SEEK_END) - 2**15))
        lines = file.read().decode(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


def _start(job: Job, keep_open: Sequence[int]) -> tuple[subprocess.Popen, int]:
    """Start a process; returns it and where in the log its words begin."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=keep_open,
        )
    return process, offset
