"""Where the numbers of a run go. A run holds a tuple of writers and calls each."""

import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from r1re_jax import files

Value = float | int | str | bool | None
# Seconds between two uploads of events to a bucket; TensorBoard looks as seldom.
EVENT_SECONDS = 60.0


def plain(value: Any) -> Value:
    """Turn a scalar of any library into what JSON can hold; NaN and infinities become None.

    Raises:
        TypeError: not a scalar, string or None.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float) or getattr(value, "ndim", None) == 0:
        number = value if isinstance(value, int | float) else value.item()
        return number if not isinstance(number, float) or math.isfinite(number) else None
    raise TypeError(
        f"a metric must be a scalar or a string, found {type(value).__name__}: {value!r}"
    )


class JsonlWriter:
    """Appends one JSON object a step to a file and flushes it, so that a crash loses nothing.

    In a bucket the file is uploaded now and then, and by `flush`, which comes before a checkpoint:
    a crash loses lines of steps that are done again.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
        """Open the file for appending.

        Args:
            path: the file; its folder is made.
            resume_step: last step that counts. Lines of later steps are dropped: the resumed run
                writes them again. None keeps every whole line. A torn last line always goes.
        """
        self.path = files.place(path)
        if self.path.exists():
            _keep_until(self.path, resume_step)
        self._lines = files.open_lines(self.path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append `{"step": step, **values}`."""
        row = {"step": int(step), **{name: plain(value) for name, value in values.items()}}
        self._lines.add(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Write what is held back."""
        self._lines.flush()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class TensorBoardWriter:
    """Writes numbers as TensorBoard scalars; strings and missing values are left out.

    Events for a bucket are written on this machine and uploaded now and then: tensorboardX, which
    could write there, waits for ever for a thread of its own once an upload has failed.
    """

    def __init__(self, folder: str | os.PathLike, *, resume_step: int | None = None):
        """Open an event file in `folder`; TensorBoard hides events after `resume_step`."""
        from tensorboardX import SummaryWriter  # protobuf: not for those who only read JSON

        purge = None if resume_step is None else resume_step + 1
        self._folder, self._beside = files.place(folder), None
        if files.is_remote(self._folder):
            self._beside = pathlib.Path(tempfile.mkdtemp(prefix="r1re-tensorboard-"))
        here = str(folder if self._beside is None else self._beside)
        self._writer, self._pause = (
            SummaryWriter(here, purge_step=purge),
            files.Pause(EVENT_SECONDS),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add each number under its name."""
        for name, value in values.items():
            number = plain(value)
            if isinstance(number, int | float):
                self._writer.add_scalar(name, float(number), global_step=int(step))
        if self._beside is not None and self._pause.over():
            self.flush()

    def flush(self) -> None:
        """Upload the events that are written; the last ones may still be on their way."""
        if self._beside is not None:
            self._writer.flush()
            for path in self._beside.iterdir():
                files.write(self._folder / path.name, path.read_bytes())

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
        if self._beside is not None:
            self.flush()
            shutil.rmtree(self._beside)
            self._beside = None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Value]]:
    """Read a metrics file: one dict a step, ascending, lines of one step merged (later ones win).

    A torn last line (a run that was killed while writing) is left out.

    Raises:
        ValueError: another line is no JSON object with an integer `step`; names file and line.
    """
    merged: dict[int, dict[str, Value]] = {}
    lines = files.read_text(files.place(path)).split("\n")
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is not None:
            merged.setdefault(row["step"], {}).update(row)
        elif line.strip() and number != len(lines):
            raise ValueError(
                f"{path}:{number}: expected a JSON object with an integer `step`, found"
                f" {line[:80]!r}"
            )
    return [merged[step] for step in sorted(merged)]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _keep_until(path: epath.Path, last: int | None) -> None:
    """Drop the lines of steps after `last` and a torn last line; the file is replaced at once."""
    text = files.read_text(path)
    whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    rows = [_parsed(line) for line in whole]
    for number, row in enumerate(rows, start=1):
        if row is None:
            raise ValueError(
                f"{path}:{number}: expected a JSON object with an integer `step`; move the file"
                " away or repair the line, nothing was changed"
            )
    kept = "".join(
        line for line, row in zip(whole, rows, strict=True) if last is None or row["step"] <= last
    )
    if kept != text:
        files.write(path, kept)
