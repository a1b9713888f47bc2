"""Live progress: a rich display in a terminal, plain lines elsewhere. Neither is silent for 30 s.

Both are writers (`write`, `close`) with two more methods: `phase` when a part of the run begins and
`tick` whenever something within a step has moved. Use with `contextlib.closing`.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r1re_jax.report.history import is_number
from r1re_jax.report.writers import plain
from r1re_jax.train import hooks

# Metric name, what it is called on screen, format. Shown in this order where a step has it.
FIGURES = (
    ("loss", "loss", ".3f"),
    ("reward", "reward", "+.2f"),
    ("accuracy", "accuracy", ".1%"),
    ("format_rate", "format", ".0%"),
    ("completions/mean_length", "length", ".0f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".2f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
)
# What a step says of itself before it calls a program for the first time.
COMPILED = ("rollout", "reference", "update")


class Progress(hooks.Writer, hooks.Progress, Protocol):
    """A writer that also hears of phases and of life within a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """All that is shown.

    Attributes:
        phase: name of the running part.
        first: steps that were finished when it began.
        step: last finished step.
        total: last step of the part; 0 where it is not known.
        began: clock when it began.
        values: the latest figures.
        note: what happens within the step.
    """

    phase: str = "starting"
    first: int = 0
    step: int = 0
    total: int = 0
    began: float = 0.0
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    def eta(self, now: float) -> float | None:
        """Seconds to the end of the phase at its mean pace; None before its first step."""
        finished = self.step - self.first
        if finished < 1 or not self.total:
            return None
        return (now - self.began) / finished * max(0, self.total - self.step)

    @property
    def doing(self) -> str:
        """What happens within the step; a phase's first step compiles its programs on the way."""
        compiles = self.note in COMPILED and self.step == self.first
        return f"{self.note} (compiling)" if compiles else self.note

    def figures(self) -> list[tuple[str, str]]:
        """Names and values as shown."""
        known = ((name, label, style) for name, label, style in FIGURES)
        return [
            (label, format(self.values[name], style))
            for name, label, style in known
            if is_number(self.values.get(name))
        ]

    def line(self, now: float) -> str:
        """Everything in one line."""
        steps = f"{self.phase} {self.step}/{self.total}" if self.total else self.phase
        eta = self.eta(now)
        times = f"{clock(now - self.began)} elapsed" + (f", {clock(eta)} to go" if eta else "")
        shown = "  ".join(f"{label} {value}" for label, value in self.figures())
        return "  ".join(part for part in (f"[{steps}]", times, shown, self.doing) if part)


def clock(seconds: float) -> str:
    """Seconds as 4:05 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def open_progress(stream: TextIO, *, heartbeat: float = 20.0) -> "LiveProgress | PlainProgress":
    """Show progress on `stream`: live where it is a terminal, as lines where it is not."""
    if stream.isatty():
        return LiveProgress(Console(file=stream))
    return PlainProgress(stream, heartbeat=heartbeat)


class PlainProgress:
    """Prints a line when a phase begins, at times when a step ends, and after long silence.

    Steps that follow each other fast share a line: there are at least `heartbeat / 2` seconds
    between two. A thread prints after `heartbeat` seconds of silence, since compilation gives no
    sign of life.
    """

    def __init__(
        self, stream: TextIO, *, heartbeat: float = 20.0, now: Callable[[], float] = time.monotonic
    ):
        """Start the heartbeat."""
        self._stream, self._heartbeat, self._now = stream, heartbeat, now
        self._lock = threading.Lock()
        self._status = Status(began=now())
        self._printed = now()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._thread.start()

    def phase(self, name: str, *, total: int, done: int = 0) -> None:
        """See `Progress`."""
        with self._lock:
            self._status = Status(
                phase=name, first=done, step=done, total=total, began=self._now(), note="begins"
            )
            self._print()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Progress`."""
        with self._lock:
            self._status = _moved(self._status, step, values)
            if self._now() - self._printed >= self._heartbeat / 2 or step == self._status.total:
                self._print()

    def tick(self, note: str = "") -> None:
        """See `Progress`."""
        with self._lock:
            self._status = dataclasses.replace(self._status, note=note)

    def close(self) -> None:
        """Stop the heartbeat."""
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._closed.wait(self._heartbeat / 4):
            with self._lock:
                if self._now() - self._printed >= self._heartbeat * 0.75:
                    self._print()

    def _print(self) -> None:
        self._printed = self._now()
        try:
            print(self._status.line(self._printed), file=self._stream, flush=True)
        except (OSError, ValueError):  # a closed pipe must not end the training
            self._closed.set()


class LiveProgress:
    """A block at the bottom of the terminal, refreshed by rich's own thread."""

    def __init__(self, console: Console, *, now: Callable[[], float] = time.monotonic):
        """Begin to show."""
        self._now = now
        # Figures come from the thread that writes them, ticks from the one that trains.
        self._lock = threading.Lock()
        self._status = Status(began=now())
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=4, transient=False
        )
        self._live.start()

    def phase(self, name: str, *, total: int, done: int = 0) -> None:
        """See `Progress`."""
        began = self._now()
        with self._lock:
            self._status = Status(phase=name, first=done, step=done, total=total, began=began)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Progress`."""
        with self._lock:
            self._status = _moved(self._status, step, values)

    def tick(self, note: str = "") -> None:
        """See `Progress`."""
        with self._lock:
            self._status = dataclasses.replace(self._status, note=note)

    def close(self) -> None:
        """Show the last state and let the terminal go."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The block as rich draws it."""
        status, now = self._status, self._now()
        head = Table.grid(padding=(0, 1))
        eta = status.eta(now)
        head.add_row(
            Text(status.phase, style="bold"),
            Text(f"{status.step}/{status.total}" if status.total else ""),
            ProgressBar(
                total=status.total or None, completed=status.step, width=30, pulse=not status.total
            ),
            Text(clock(now - status.began), style="dim"),
            Text(f"{clock(eta)} to go" if eta is not None else "", style="dim"),
            Text(status.doing, style="dim"),
        )
        figures = Table.grid(padding=(0, 2))
        shown = status.figures()
        if shown:
            figures.add_row(*(Text(label, style="dim") for label, _ in shown))
            figures.add_row(*(Text(value, style="bold") for _, value in shown))
        return Group(head, figures)


def _moved(status: Status, step: int, values: Mapping[str, Any]) -> Status:
    """The status after a step; figures that the step does not give stay as they were."""
    known = {name for name, _, _ in FIGURES}
    fresh = {name: plain(value) for name, value in values.items() if name in known}
    return dataclasses.replace(status, step=step, values={**status.values, **fresh}, note="")
