"""SIGTERM and SIGINT as requests to stop: heeded at the next boundary, the second one at once.

The main thread may sit for minutes in a compilation or a device program, where no Python handler
runs. The interpreter's wake-up file descriptor is written whatever the main thread does, and a
thread that reads it counts the signals.
"""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  not an error: somebody asked for it
    """The run was asked to stop and reached a boundary."""

    def __init__(self, number: int):
        """Remember which signal asked."""
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it: what waits for the run must not take it as finished."""
        return 128 + self.number


class StopSignals:
    """While entered, a first signal is a request that `poll` raises, a second one ends the process.

    Enter it in the main thread, before anything slow. At the second signal the process exits at
    once with 128 + signal and cleans nothing up.
    """

    def __init__(self) -> None:
        """Nothing happens before it is entered."""
        self._requested: int | None = None

    @property
    def requested(self) -> int | None:
        """The signal that asked to stop, or None."""
        return self._requested

    def poll(self) -> None:
        """Raise `Stopped` if a signal has arrived; costs nothing otherwise."""
        if self._requested is not None:
            raise Stopped(self._requested)

    def __enter__(self) -> "StopSignals":
        """Take the signals over."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {number: signal.signal(number, _let_pass) for number in STOP_SIGNALS}
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        while data := self._reader.recv(16):
            for number in data:
                if number not in STOP_SIGNALS:
                    continue  # another handler's signal shares the descriptor
                if self._requested is not None:
                    os._exit(128 + number)
                self._requested = int(number)


def _let_pass(number: int, frame: FrameType | None) -> None:
    """Do nothing: a handler in place keeps the signal from killing, a thread heeds it."""
