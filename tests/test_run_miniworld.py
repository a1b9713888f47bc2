"""The command miniworld: held-out sets as files."""

import pathlib
import subprocess
import sys

import pytest

from r1re_jax.task import miniworld
from r1re_jax.task.readers import read_jsonl
from r1re_jax.task.relations import load_guide

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """`python -m run.miniworld` with the arguments."""
    command = [sys.executable, "-m", "run.miniworld", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_held_out_sets_are_written_as_evaluate_reads_them(tmp_path: pathlib.Path) -> None:
    done = run(f"--data={tmp_path / 'sets'}", "--count=5", "--seed=2")
    assert done.returncode == 0, done.stderr
    for domain in ("general", "medical"):
        guide = load_guide(tmp_path / "sets" / f"{domain}.md")
        examples = read_jsonl(tmp_path / "sets" / f"{domain}.jsonl", schema=guide.schema)
        made_guide, made = miniworld.examples(domain=domain, count=5, seed=2)
        assert (guide.text, tuple(examples)) == (made_guide.text, made)
        assert f"{domain}.jsonl: 5 examples" in done.stdout


@pytest.mark.parametrize("args", [[], ["--data=x", "stray"]], ids=["nothing", "stray"])
def test_what_it_cannot_use_is_refused(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode != 0
    assert "give --fresh=DIR or --data=DIR" in done.stdout + done.stderr
