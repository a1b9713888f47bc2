"""The folder of an evaluation: what was asked, predictions as they come, and how it goes on.

`evaluate.json` says what was asked, `predictions.jsonl` has one line an example, `metrics.json` is
there when the evaluation is finished. A folder of another evaluation is refused, never overwritten.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from r1re_jax import files, hosts
from r1re_jax.task.tasks import AnyExample

ASKED, PREDICTIONS, METRICS = "evaluate.json", "predictions.jsonl", "metrics.json"
# Sentences kept beside the predictions, so that a report can show what was asked.
SENTENCES = 200

Row = dict[str, Any]


class EvaluationError(ValueError):
    """An evaluation that cannot be made or gone on with; nothing was overwritten."""


def begin(folder: epath.Path, asked: dict[str, Any], examples: Sequence[AnyExample]) -> list[Row]:
    """Make the folder ready and return the rows that it holds already.

    Args:
        folder: made if it is not there.
        asked: everything that a prediction depends on; plain JSON values.
        examples: in the order of the predictions.

    Raises:
        EvaluationError: the folder holds an evaluation that asked something else, one of unknown
            origin, or predictions that are not of these examples.
    """
    note = folder / ASKED
    if note.exists():
        _check_same(folder, _parsed(note.read_bytes()).get("asked", {}), asked)
        return _resume(folder / PREDICTIONS, examples, asked["samples"])
    for name in (PREDICTIONS, METRICS):
        if (folder / name).exists():
            raise EvaluationError(
                f"{folder / name} is there without {ASKED}, so nobody knows what it is of; move it"
                " away or choose another folder. Nothing was changed."
            )
    sentences = {example.id: example.question for example in examples[:SENTENCES]}
    text = json.dumps({"asked": asked, "sentences": sentences}, ensure_ascii=False, indent=1)
    replace(note, text + "\n")
    return []


def _check_same(folder: epath.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a folder of another evaluation, naming every difference."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        shown = "; ".join(
            f"{name} is {_short(before.get(name))} there and {_short(now.get(name))} here"
            for name in names
        )
        raise EvaluationError(
            f"{folder} holds another evaluation: {shown}. Choose another folder or move that one"
            " away. Nothing was changed."
        )


def _resume(path: epath.Path, examples: Sequence[AnyExample], samples: int) -> list[Row]:
    """Read the rows of an interrupted evaluation; a torn last line is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        row = _parsed(line)
        expected = examples[number - 1].id if number <= len(examples) else "the end of the file"
        if row.get("id") != expected or len(row.get("samples", ())) != samples:
            raise EvaluationError(
                f"{path}:{number}: expected {samples} samples of example {expected!r}, found"
                f" {line[:60]!r}; move the folder away to evaluate anew. Nothing was changed."
            )
        rows.append(row)
    if len(whole) < len(data) and hosts.is_first():
        files.write(path, whole)
    return rows


def _parsed(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


class Growing:
    """predictions.jsonl as rows come: lasting at once, or uploaded to a bucket now and then."""

    def __init__(self, folder: epath.Path | None):
        """Open the file of a folder that `begin` made ready; of None nothing is written."""
        writes = folder is not None and hosts.is_first()
        self._lines = files.open_lines(folder / PREDICTIONS, after=os.fsync) if writes else None

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows at once: a kill leaves whole lines and at most one torn one."""
        if self._lines is not None:
            self._lines.add("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def close(self) -> None:
        """Write what was held back."""
        if self._lines is not None:
            self._lines.close()


def replace(path: epath.Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    if hosts.is_first():
        files.write(path, text)


def sha256(value: Any) -> str:
    """Hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)
