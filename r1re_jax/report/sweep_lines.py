"""A sweep's progress as lines: what begins and ends, and at times how far all have come."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from r1re_jax.report.progress import clock


class Running(Protocol):
    """A member that runs.

    Attributes:
        name: of the member.
        log: file that takes what it says.
    """

    name: str
    log: pathlib.Path


class SweepLines:
    """Writes lines to a stream, two of them never further apart than `heartbeat` seconds."""

    def __init__(
        self,
        stream: TextIO,
        *,
        total: int,
        heartbeat: float = 15.0,
        now: Callable[[], float] = time.monotonic,
    ):
        """Say nothing yet.

        Args:
            stream: takes the lines.
            total: members of the sweep.
            heartbeat: seconds; `beat` must be called more often.
            now: the clock.
        """
        self._stream, self._heartbeat, self._now = stream, heartbeat, now
        self._total, self._done, self._failed = total, 0, 0
        self._began, self._spoke = now(), now()

    def begin(self, *, todo: int) -> None:
        """Say how many members are to run; the others have nothing left to do."""
        self._done = self._total - todo
        self._say(f"{todo} of {self._total} members to run" if todo else "nothing to run")

    def began(self, job: Running) -> None:
        """A member runs."""
        self._say(f"{job.name} begins, log in {job.log}")

    def ended(self, job: Running, code: int, said: Sequence[str]) -> None:
        """A member has ended; the last lines of its log are shown if it did not end well."""
        if code == 0:
            self._done += 1
            self._say(f"{job.name} is done")
            return
        self._failed += 1
        self._say(f"{job.name} ended with status {code}. The end of {job.log}:")
        for line in said:
            self._write(f"    {line}")

    def beat(self, running: Sequence[Running]) -> None:
        """Say what members said last, if nothing has been said for a while."""
        if self._now() - self._spoke < self._heartbeat:
            return
        self._say(f"{len(running)} running")
        for job in running:
            self._write(f"    {job.name}: {_last_line(job.log)}")

    def wait(self, why: str) -> None:
        """Say why nothing runs yet, if nothing has been said for a while."""
        if self._now() - self._spoke >= self._heartbeat:
            self._say(f"waiting: {why}")

    def _say(self, text: str) -> None:
        self._spoke = self._now()
        counts = f"{self._done}/{self._total} done"
        counts += f", {self._failed} not" if self._failed else ""
        self._write(f"[sweep {counts}]  {clock(self._spoke - self._began)} elapsed  {text}")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not end the sweep
            self._stream.write(line + "\n")
            self._stream.flush()


def _last_line(path: pathlib.Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2**12))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
