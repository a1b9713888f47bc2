"""Lines of JSON: read typed, with errors that name file and line, and written whole or not."""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from etils import epath

from r1re_jax.files import open_bytes, place, write
from r1re_jax.task.schema import DataError


class HasId(Protocol):
    """What has a name of its own in its file."""

    @property
    def id(self) -> str:
        """The name."""
        ...


Identified = TypeVar("Identified", bound=HasId)


@contextlib.contextmanager
def located(source: str | os.PathLike[str], number: int) -> Iterator[None]:
    """Puts the place in front of a data error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}:{number}: {error}") from None


def collect(
    rows: Iterable[tuple[int, Identified]], *, source: str | os.PathLike[str]
) -> list[Identified]:
    """The examples of numbered rows; there must be some, and their ids must differ."""
    examples: list[Identified] = []
    line_of: dict[str, int] = {}
    for number, example in rows:
        if example.id in line_of:
            raise DataError(
                f"{source}:{number}: id {example.id!r} is that of line {line_of[example.id]} too; "
                "ids must differ"
            )
        line_of[example.id] = number
        examples.append(example)
    if not examples:
        raise DataError(f"{source}: the file is empty; expected at least one example")
    return examples


def numbered_lines(path: epath.Path, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file; blank ones if asked, else they may only end the file."""
    opened = open_bytes(path)
    unpacked = gzip.open(opened) if path.suffix == ".gz" else opened
    number, skipped = 0, None
    try:
        with opened, unpacked as file:
            for number, data in enumerate(file, start=1):
                line = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip() or blank:
                    if skipped is not None and not blank:
                        raise DataError(
                            f"{path}:{skipped}: a blank line; expected one JSON object a line"
                        )
                    yield number, line
                elif skipped is None:
                    skipped = number
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read behind line {number}: {error}") from None


def decode_object(line: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from None
    except RecursionError:
        raise DataError("not JSON that can be read: nested too deep") from None
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {kind_of(row)}")
    return row


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, packed where the name ends in .gz; equal rows give equal bytes."""
    path = place(path)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


_REQUIRED = object()
_KINDS = {
    str: "a string",
    int: "an integer",
    dict: "an object",
    list: "a list",
    float: "a number",
    bool: "a boolean",
}


def value(
    row: dict[str, Any], key: str, kind: type, *, of: str | None = None, default: Any = _REQUIRED
) -> Any:
    """A key's value of the right type; null is as good as no key where there is a default."""
    name = key if of is None else f"{of}.{key}"
    found = row.get(key)
    if found is None and default is not _REQUIRED:
        return default
    if key not in row:
        raise DataError(f"the key {name!r} is missing; found {', '.join(sorted(row)) or 'no key'}")
    if not isinstance(found, kind) or isinstance(found, bool):
        raise DataError(f"{name!r} must be {_KINDS[kind]}, found {kind_of(found)}")
    return found


def kind_of(value: Any) -> str:
    """What a decoded value is, for a message."""
    return "null" if value is None else f"{_KINDS[type(value)]} ({str(value)[:40]!r})"
