"""The commands that take a recipe: overrides by flag, and what the doctor says of it."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.train.world import config, write_inputs

ROOT = pathlib.Path(__file__).resolve().parents[1]

RECIPE = "--config=configs/miniworld.py"


def show(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m run.show` as a process: overrides are read from the command line itself."""
    command = [sys.executable, "-m", "run.show", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_flag_sets_keys_that_the_recipe_has_and_lacks(tmp_path: pathlib.Path) -> None:
    found = tmp_path / "found.json"
    flags = "--config.grpo.steps=7", "--config.grpo.loss=dr_grpo", f"--json={found}"
    process = show(f"{RECIPE}:sft_only", *flags)
    assert process.returncode == 0, process.stderr
    shown = json.loads(found.read_text())
    assert shown["config"]["grpo"]["steps"] == 7
    assert shown["config"]["grpo"]["loss"] == "dr_grpo"
    origins = shown["origins"]
    assert origins["grpo.steps"] == origins["grpo.loss"] == "flag"
    assert (origins["grpo.group"], origins["grpo.clip_low"]) == ("recipe", "default")
    rows = [line.split() for line in process.stdout.splitlines()]
    assert ["grpo.steps", "7", "flag"] in rows and ["grpo.group", "8", "recipe"] in rows
    assert f"hash {shown['hash']}" in process.stdout
    assert any(row[:1] == ["layers.gate.weight"] for row in rows)


def test_sections_that_a_recipe_leaves_out_can_be_set(tmp_path: pathlib.Path) -> None:
    write_inputs(tmp_path)
    values = config(tmp_path)
    assert not {"mesh", "lora"} & values.keys() and "reference" not in values["grpo"]
    recipe = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict("
    (tmp_path / "recipe.py").write_text(f"{recipe}{values!r})\n")
    flags = ("--config.lora.rank=2", "--config.grpo.reference.every=3")
    recipe = f"--config={tmp_path / 'recipe.py'}"
    process = show(recipe, *flags, f"--json={tmp_path / 'shown.json'}")
    assert process.returncode == 0, process.stderr
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert shown["config"]["lora"]["rank"] == 2
    assert shown["config"]["grpo"]["reference"]["every"] == 3
    names = ("lora.rank", "grpo.reference.every", "lora.alpha", "mesh.data", "grpo.steps")
    found = [shown["origins"][name] for name in names]
    assert found == ["flag", "flag", "default", "default", "recipe"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.grpo.stps=3", "unknown key grpo.stps; did you mean grpo.steps?"),
        ("--config.grpo.loss=dr_grp", "did you mean 'dr_grpo'?"),
        ("--config.mehs.data=2", 'Did you mean "mesh" instead of "mehs"?'),
    ],
)
def test_a_flag_that_nothing_reads_is_refused(flag: str, message: str) -> None:
    process = show(RECIPE, flag)
    assert process.returncode == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_doctor_prints_and_writes_what_it_found(tmp_path: pathlib.Path) -> None:
    write_inputs(tmp_path)
    mesh = {"data": 4, "tensor": 2}
    values = config(tmp_path, mesh=mesh, sft__questions=4, grpo__questions=4)
    recipe = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict("
    (tmp_path / "recipe.py").write_text(f"{recipe}{values!r})\n")

    def doctor(*args: str) -> subprocess.CompletedProcess[str]:
        found = tmp_path / "found.json"
        more = [f"--config={tmp_path / 'recipe.py'}", f"--json={found}", *args]
        command = [sys.executable, "-m", "run.doctor", *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    process = doctor(f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr.splitlines()[-1] == "parity: ok"
    assert "decode, training: mean " in process.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] and {check["status"] for check in found["checks"]} == {"ok"}
    assert not (tmp_path / "run").exists()
    process = doctor("--config.grpo.grop=3")
    assert process.returncode == 1
    assert "did you mean grpo.group?" in process.stdout
    assert "Traceback" not in process.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["ok"] and found["checks"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("body", "returncode", "said"),
    [
        (None, 1, "nofile"),
        ("config.lock()\n    return config", 0, ""),
        ("return FrozenConfigDict(config)", 0, ""),
        ("return None", 1, "None"),
    ],
)
def test_recipes_of_any_kind_are_read_or_refused_in_a_line(
    body: str | None, returncode: int, said: str, tmp_path: pathlib.Path
) -> None:
    write_inputs(tmp_path)
    path = tmp_path / ("nofile.py" if body is None else "recipe.py")
    if body is not None:
        path.write_text(
            "from ml_collections import ConfigDict, FrozenConfigDict\n\n\ndef get_config():\n"
            f"    config = ConfigDict({config(tmp_path)!r})\n    {body}\n"
        )
    process = show(f"--config={path}")
    assert process.returncode == returncode, process.stderr
    assert said in process.stderr
    assert "Traceback" not in process.stderr
