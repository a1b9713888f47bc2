"""Programs that are timed in turn: each is a process that does one piece of work when told to.

A worker warms up, says so, and then does its work once for every line of its standard input. It
answers with the seconds that the work took by its own clock, so that neither starting nor compiling
counts, and only one side works at a time.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a worker says to the driver begins with it; all other output is its libraries'.
MARK = "@bench "


@dataclasses.dataclass
class Worker:
    """A process that works when told to.

    Attributes:
        name: of the side.
        process: with pipes.
        about: what it said of itself when it was ready.
        log: where everything else that it prints goes.
    """

    name: str
    process: subprocess.Popen
    about: Mapping[str, Any]
    log: Path

    def work(self, command: str = "step") -> float:
        """Do one piece of work; return its seconds.

        Between two turns the process stands still, so that what it goes on with behind its answer
        (a learner that trains while it waits) is done in its own time and not in that of others.
        """
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        seconds = _answer(self.process, self.name, self.log)["seconds"]
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def woken(self, command: str = "step") -> float:
        """Do a piece of work twice; return the seconds of the second.

        The longer a process stood still, the more of its memory has left the caches, or was taken
        back by the system: whoever waits for slow sides would pay for it.
        """
        self.work(command)
        return self.work(command)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def start(
    name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> Worker:
    """Start a worker and wait until it has warmed up.

    Raises:
        RuntimeError: it ended instead; the message has the end of its log.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=os.environ | (environment or {}),
        )
    worker = Worker(name, process, _answer(process, name, log), log)
    process.send_signal(signal.SIGSTOP)
    return worker


def take_turns(
    pieces: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, list[float]]:
    """Time all pieces in turn, A B C A B C …: {name: seconds of each round}."""
    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for number in range(rounds):
        for name, piece in pieces.items():
            seconds[name].append(piece())
        shown = "  ".join(f"{name} {times[-1]:.3f}" for name, times in seconds.items())
        say(f"round {number + 1}/{rounds}: {shown}")
    return seconds


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of over / under: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def serve(about: Mapping[str, Any], work: Mapping[str, Callable[[], None]]) -> None:
    """Be a worker: say what is known, then work for every line read. Returns at its end."""
    tell(about)
    for line in sys.stdin:
        begin = time.perf_counter()
        work[line.strip()]()
        tell({"seconds": time.perf_counter() - begin})


def tell(message: Mapping[str, Any]) -> None:
    """Say something to the driver."""
    print(MARK + json.dumps(message), flush=True)


def _answer(process: subprocess.Popen, name: str, log: Path) -> dict[str, Any]:
    """Read up to what is for the driver; keep all else in the log."""
    with log.open("a") as other:
        for line in process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            other.write(line)
    code = process.wait()
    end = "\n".join(log.read_text().splitlines()[-15:])
    raise RuntimeError(f"{name} ended with {code}; the end of {log}:\n{end}")
