"""What a run calls outside: writers of figures, progress for people, and whether to stop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class Writer(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record them."""

    def close(self) -> None:
        """Flush and release."""


@runtime_checkable
class Buffered(Protocol):
    """A writer that may hold figures back for a while."""

    def flush(self) -> None:
        """Write them; what was written lasts longer than the process."""


def write_all(writers: Sequence[Writer], step: int, values: Mapping[str, Any]) -> None:
    """Have every writer record the figures of a step."""
    for writer in writers:
        writer.write(step, values)


def flush_all(writers: Sequence[Writer]) -> None:
    """Have every writer hold nothing back: a checkpoint is to count what they have."""
    for writer in writers:
        if isinstance(writer, Buffered):
            writer.flush()


class Progress(Protocol):
    """Hears of parts of a run and of life within a step."""

    def phase(self, name: str, *, total: int, done: int = 0) -> None:
        """A part begins: `total` is its last step, `done` the last completed one."""

    def tick(self, note: str = "") -> None:
        """Something moved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run calls outside.

    Attributes:
        poll: called often, at places where the run may stop; raises `Stopped` to stop it there.
        writers: last step that counts (-1: none) -> writers of this run; they drop later steps.
        progress: shown to people; None shows nothing.
        before_step: called before every step with its phase and number.
    """

    poll: Callable[[], None] = lambda: None
    writers: Callable[[int], Sequence[Writer]] = lambda resume_step: ()
    progress: Progress | None = None
    before_step: Callable[[str, int], None] = lambda phase, number: None

    def note(self, text: str) -> None:
        """Tell people what happens now."""
        if self.progress is not None:
            self.progress.tick(text)
