"""What a run calls outside: writers of figures, progress for people, and whether to stop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Writer(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record them."""

    def close(self) -> None:
        """Flush and release."""


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
