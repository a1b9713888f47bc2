"""Compiled programs are kept, where the user does not say otherwise."""

import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import os, jax
from run.programs import keep_programs
keep_programs()
jax.jit(lambda x: x * 2 + 1)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


def told(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_programs_lie_in_the_cache_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pathlib.Path(told({"R1RE_CACHE": str(tmp_path)}, monkeypatch))
    assert found.parent == tmp_path / "programs"


def test_another_place_or_none_can_be_asked_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"R1RE_CACHE": str(tmp_path), "R1RE_KEEP_PROGRAMS": "0"}
    assert told(given, monkeypatch) == "None"
    given = {"R1RE_KEEP_PROGRAMS": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    assert told(given, monkeypatch) == str(tmp_path / "mine")
    assert not (tmp_path / "programs").exists()
