"""What the host writes while the device goes on: done in order, by a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Aside:
    """Does one thing after the other, beside its caller.

    What fails is raised by the next call of `do` or `settle`.
    """

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")
        self._begun: list[Future] = []

    def do(self, work: Callable[..., None], *args: Any) -> None:
        """Have `work(*args)` done after all that was given before; the arguments must not change.

        Raises:
            Exception: what earlier work raised.
        """
        ended = [one for one in self._begun if one.done()]
        self._begun = [one for one in self._begun if not one.done()]
        for one in ended:
            one.result()
        self._begun.append(self._thread.submit(work, *args))

    def settle(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: what the work raised.
        """
        begun, self._begun = self._begun, []
        for one in begun:
            one.result()

    def close(self) -> None:
        """Wait until all is done, whatever it raises, and end the thread."""
        self._thread.shutdown(wait=True)
