"""Where the numbers of a run go. A run holds a tuple of writers and calls each."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

Value = float | int | str | bool | None


class Writer(Protocol):
    """Takes the figures of a step. A step may be written several times with different names."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` (Python, NumPy or JAX scalars and strings) under `step`."""

    def close(self) -> None:
        """Flush and release what the writer holds."""


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
    """Appends one JSON object a step to a file and flushes it, so that a crash loses nothing."""

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
        """Open the file for appending.

        Args:
            path: the file; its folder is made.
            resume_step: last step that counts. Lines of later steps are dropped: the resumed run
                writes them again. None keeps every whole line. A torn last line always goes.
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _keep_until(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append `{"step": step, **values}`."""
        row = {"step": int(step), **{name: plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes numbers as TensorBoard scalars; strings and missing values are left out."""

    def __init__(self, folder: str | os.PathLike, *, resume_step: int | None = None):
        """Open an event file in `folder`; TensorBoard hides events after `resume_step`."""
        from tensorboardX import SummaryWriter  # protobuf: not for those who only read JSON

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add each number under its name."""
        for name, value in values.items():
            number = plain(value)
            if isinstance(number, int | float):
                self._writer.add_scalar(name, float(number), global_step=int(step))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Value]]:
    """Read a metrics file: one dict a step, ascending, lines of one step merged (later ones win).

    A torn last line (a run that was killed while writing) is left out.

    Raises:
        ValueError: another line is no JSON object with an integer `step`; names file and line.
    """
    merged: dict[int, dict[str, Value]] = {}
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
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


def _keep_until(path: pathlib.Path, last: int | None) -> None:
    """Drop the lines of steps after `last` and a torn last line; the file is replaced at once."""
    text = path.read_text(encoding="utf-8")
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
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(path)
