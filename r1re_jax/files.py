"""Files and folders: on this machine, or on Google Cloud Storage as gs://BUCKET/NAME.

What may be either is an `etils.epath.Path`, made by `place`; a path of this machine stays one. A
bucket's objects differ from files in three ways, which this module alone has to know: one is there
whole when its upload ends, so that nothing is renamed into place; none can be appended to (gcsfs
would overwrite it); and a folder is no more than what names begin with, so that none is made.
"""

import contextlib
import functools
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from time import monotonic
from typing import IO, Protocol

from etils import epath

REMOTE = "gs://"
# Seconds between two uploads of an object that grows. Google takes one a second, and each is whole.
UPLOAD_SECONDS = 10.0


class PlaceError(ValueError):
    """A path that cannot be used: the message says what to do."""


def place(path: str | os.PathLike) -> epath.Path:
    """Return a path of this machine or of a bucket, which is reached first, once a process.

    Raises:
        PlaceError: another scheme than gs://, gcsfs is not installed, no such bucket, or one that
            these credentials may not list.
    """
    name = os.fspath(path)
    scheme, remote, rest = name.partition("://")
    if not remote:
        if name.startswith("gs:/"):  # what pathlib makes of it, and a folder `gs:` on this machine
            raise PlaceError(f"{name} has one slash too few; expected {REMOTE}BUCKET/…")
        return epath.Path(name)
    bucket = rest.partition("/")[0]
    if f"{scheme}://" != REMOTE or not bucket:
        raise PlaceError(f"{name} cannot be used; expected a path, or {REMOTE}BUCKET/…")
    _ask(bucket, "b/{}/o?maxResults=1")
    return epath.Path(name)


def check_bucket(path: epath.Path) -> None:
    """Ask what kind of bucket a path is of: Orbax will, for which reading objects is not enough.

    Raises:
        PlaceError: these credentials may not know it.
    """
    if is_remote(path):
        _ask(os.fspath(path).removeprefix(REMOTE).partition("/")[0], "b/{}")


@functools.cache
def _ask(bucket: str, question: str) -> None:
    """Ask something of a bucket, once: a slip costs a line here, and not a run."""
    import fsspec  # takes a while, and few need it

    # It would answer from what it listed once, for ever; Orbax writes past it, and others do.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:  # by the words of etils, so that it logs in once
        fsspec.filesystem("gcs", finalize_on_close=True).call("GET", question, bucket)
    except ImportError:
        raise PlaceError(
            f"{REMOTE}{bucket} needs gcsfs, which is not installed: pip install gcsfs"
        ) from None
    except FileNotFoundError:
        raise PlaceError(
            f"there is no bucket {REMOTE}{bucket}: correct the name, or make it with"
            f" `gcloud storage buckets create {REMOTE}{bucket}`"
        ) from None
    except Exception as error:  # whatever was refused, by whichever of its libraries
        raise PlaceError(
            f"{REMOTE}{bucket} cannot be used: {' '.join(str(error).split())}. Log in with `gcloud"
            " auth application-default login`, or name a key in GOOGLE_APPLICATION_CREDENTIALS; the"
            " account needs the roles Storage Object User (storage.objectUser) and, for work"
            " directories, Storage Legacy Bucket Reader (storage.legacyBucketReader) on the bucket"
        ) from None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is of a bucket."""
    return os.fspath(path).startswith(REMOTE)


def absolute(path: epath.Path) -> epath.Path:
    """Return a path that is the same from any folder; `..` and links stay as they are."""
    return path if is_remote(path) else epath.Path(pathlib.Path(path).absolute())


def children(folder: epath.Path) -> list[epath.Path]:
    """Return what is in a folder, in order; nothing where there is no such folder."""
    if not folder.is_dir():
        return []
    found = sorted(folder.iterdir())
    # Consoles mark an empty folder by an object, which is listed as the folder within itself.
    return [path for path in found if path.name != folder.name or path.exists()]


def open_bytes(path: epath.Path) -> IO[bytes]:
    """Open a file to be read; an object is read at once, in place of a request for every part."""
    return io.BytesIO(path.read_bytes()) if is_remote(path) else path.open("rb")


def read_text(path: epath.Path, encoding: str = "utf-8") -> str:
    """Read a text; epath itself takes another encoding than it is told."""
    with io.TextIOWrapper(open_bytes(path), encoding) as file:
        return file.read()


def write(path: epath.Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all; its folder is made."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def remove(path: epath.Path) -> None:
    """Remove a file, or a folder with all that it holds."""
    path.rmtree() if path.is_dir() else path.unlink()


def free_bytes(folder: epath.Path) -> int | None:
    """Write and remove a file there; return how much else there is room for, None if unknown."""
    if not is_remote(folder):
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
    return None


class Pause:
    """Says whether some seconds have passed since it last said so."""

    def __init__(self, seconds: float):
        """Begin to wait."""
        self._seconds, self._since = seconds, monotonic()

    def over(self) -> bool:
        """Whether it is time, and if so, wait anew."""
        now = monotonic()
        if now - self._since < self._seconds:
            return False
        self._since = now
        return True


class Lines(Protocol):
    """A file that grows by lines."""

    def add(self, text: str) -> None:
        """Add whole lines."""

    def flush(self) -> None:
        """Return when all that was added lasts longer than the process."""

    def close(self) -> None:
        """Flush, and release what is held."""


def open_lines(path: epath.Path, *, after: Callable[[int], object] = lambda number: None) -> Lines:
    """Open a file to add lines to, behind those that it has.

    On this machine lines are in the file when `add` returns. An object is written anew with all its
    lines, when `UPLOAD_SECONDS` have passed, at `flush` and at `close`.

    Args:
        path: the file; its folder is made.
        after: called with the descriptor of a file of this machine after each addition.
    """
    return RemoteLines(path) if is_remote(path) else LocalLines(path, after=after)


class LocalLines:
    """`Lines` of a file of this machine."""

    def __init__(self, path: epath.Path, *, after: Callable[[int], object]):
        """Open it; see `open_lines`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._after = path.open("a"), after

    def add(self, text: str) -> None:
        """Add whole lines at once: a kill leaves whole ones and at most one torn."""
        self._file.write(text)
        self._file.flush()
        self._after(self._file.fileno())

    def flush(self) -> None:
        """Do nothing: they are in the file."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RemoteLines:
    """`Lines` of an object, which is never seen torn."""

    def __init__(self, path: epath.Path):
        """Read what it holds."""
        self._path, self._pause = path, Pause(UPLOAD_SECONDS)
        self._data = bytearray(path.read_bytes() if path.exists() else b"")
        self._uploaded = len(self._data)

    def add(self, text: str) -> None:
        """Hold whole lines, and upload them when it is time."""
        self._data += text.encode()
        if self._pause.over():
            self.flush()

    def flush(self) -> None:
        """Upload what is new."""
        if self._uploaded < len(self._data):
            self._path.write_bytes(bytes(self._data))
            self._uploaded = len(self._data)

    def close(self) -> None:
        """Upload what is new."""
        self.flush()


@contextlib.contextmanager
def fetched(source: epath.Path) -> Iterator[pathlib.Path]:
    """Give a file or folder of this machine: itself, or a copy that is removed afterwards."""
    if not is_remote(source):
        yield pathlib.Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="r1re-") as folder:
        copy = pathlib.Path(folder) / source.name
        _fetch(source, copy)
        yield copy


def _fetch(source: epath.Path, target: pathlib.Path) -> None:
    if not source.is_dir():
        source.copy(target)
        return
    target.mkdir()
    for child in children(source):
        _fetch(child, target / child.name)


@contextlib.contextmanager
def written(folder: epath.Path, *, last: str) -> Iterator[pathlib.Path]:
    """Give a folder of this machine to write: itself, or one that is uploaded afterwards.

    Args:
        folder: where it is to be.
        last: name of the file that says that all are there: it is uploaded behind the others. If an
            upload fails, those before it are removed.
    """
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="r1re-") as beside:
        copy = pathlib.Path(beside) / folder.name
        yield copy
        found = (path for path in copy.rglob("*") if path.is_file())
        done: list[epath.Path] = []
        try:
            for path in sorted(found, key=lambda path: (path.name == last, path)):
                done.append(folder / path.relative_to(copy).as_posix())
                epath.Path(path).copy(done[-1], overwrite=True)
        except BaseException:
            for path in done:
                path.unlink(missing_ok=True)
            raise
