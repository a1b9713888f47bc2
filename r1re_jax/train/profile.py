"""Traces of some steps, for xprof or TensorBoard, of which the parts have names.

`train` is a step; within it are `rollout`, `reward`, `reference` and `update`, and behind it
`evaluation` and `checkpoint`. These names are set whether or not anything is traced: they cost less
than a microsecond.
"""

import pathlib

import jax


class StepProfiler:
    """Traces the second step of each phase and those after it: the first one compiles."""

    def __init__(self, folder: pathlib.Path, *, steps: int):
        """Trace nothing yet.

        Args:
            folder: made when the first trace begins.
            steps: how many of each phase; 0 traces none.
        """
        self.folder, self._steps = folder, steps
        self._phase, self._begun, self._running = "", 0, False
        self.traces: list[str] = []

    def before_step(self, phase: str, number: int) -> None:
        """Begin or end a trace; called before every step with its phase and number."""
        if phase != self._phase:
            self.close()
            self._phase, self._begun = phase, 0
        self._begun += 1
        if self._steps and self._begun == 2:
            self._start(f"{phase}-{number}")
        elif self._begun == 2 + self._steps:
            self.close()

    def close(self) -> None:
        """End a trace that runs, and write it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def _start(self, name: str) -> None:
        options = jax.profiler.ProfileOptions()
        # Every Python call would be an event else: many times the size, and the host slowed down.
        options.python_tracer_level = 0
        options.session_id = name  # else the second that it ends in: two phases could be one
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self._running = True
        self.traces.append(name)
