"""run/sky.yaml and the Dockerfile: what they name is here, and what they install is the lock."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SKY = ROOT / "run" / "sky.yaml"
TASK = yaml.safe_load(SKY.read_text())
PARSE = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(wanted,) = task.resources
print(wanted.cloud, wanted.accelerators, wanted.accelerator_args, wanted.use_spot)
"""


def instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions: name and words."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text())
    lines = [line.split() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(words[0], words[1:]) for words in lines]


def words_of(name: str) -> list[list[str]]:
    """The words of all instructions of a name."""
    return [words for found, words in instructions() if found == name]


def test_the_task_is_of_a_spot_slice_with_recovery() -> None:
    wanted = TASK["resources"]
    assert wanted["accelerators"] == "tpu-v5litepod-16"
    assert wanted["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert wanted["use_spot"] is True and wanted["job_recovery"]["strategy"]
    assert TASK["workdir"] == "." and TASK["envs"]["R1RE_WORKDIR"].startswith("gs://")
    assert not any(TASK["secrets"].values()), "secrets come from the environment alone"


def test_what_the_task_runs_is_here() -> None:
    commands = TASK["setup"] + TASK["run"]
    scripts = re.findall(r"bash (\S+)", commands)
    modules = re.findall(r"python -m (\S+)", commands)
    assert scripts and modules
    assert all((ROOT / script).is_file() for script in scripts)
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)
    assert (ROOT / TASK["envs"]["R1RE_CONFIG"]).is_file()
    known = {*TASK["envs"], *TASK["secrets"]}
    assert set(re.findall(r"\$\{?(\w+)", commands)) <= known
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", TASK[part]], check=True)


def test_a_placeholder_ends_the_task_at_once() -> None:
    result = subprocess.run(
        ["bash", "-c", TASK["setup"]],
        env={"PATH": os.environ["PATH"], "R1RE_WORKDIR": TASK["envs"]["R1RE_WORKDIR"]},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 1 and "--env R1RE_WORKDIR" in result.stdout


def test_skypilot_accepts_the_task(tmp_path: pathlib.Path) -> None:
    python = os.environ.get("R1RE_SKY_PYTHON")
    if not python:
        pytest.skip("R1RE_SKY_PYTHON names no interpreter that has skypilot[gcp]")
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    result = subprocess.run(
        [python, "-c", PARSE, SKY],
        env=clean | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("GCP {'tpu-v5litepod-16': 1}")
    assert "'runtime_version': 'v2-alpha-tpuv5-lite'" in result.stdout
    assert result.stdout.split()[-1] == "True"


def test_what_the_image_copies_is_here_and_in_its_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and line[0] != "#"]
    assert rules[0] == "*", "everything is left out that is not named"
    let_in = {rule[1:] for rule in rules if rule[0] == "!"}
    sources = [source for words in words_of("COPY") for source in words[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert let_in == {source.split("/")[0] for source in sources}


def test_the_image_installs_the_lock_and_nothing_else() -> None:
    runs = [" ".join(words) for words in words_of("RUN")]
    installs = [run for run in runs if "pip install" in run]
    lock, ours = installs
    options = "--no-cache-dir --require-hashes"
    files = ["-r requirements/runtime.txt", "-r requirements/tpu.txt"]
    assert lock == f"pip install {options} {' '.join(files)}"
    assert ours == "pip install --no-cache-dir --no-deps --no-build-isolation --editable ."
    copied = [words for words in words_of("COPY") if words[0].startswith("requirements/")]
    assert copied == [["requirements/runtime.txt", "requirements/tpu.txt", "requirements/"]]
    pins = re.findall(r"(?m)^([a-z]+)==", (ROOT / "requirements" / "tpu.txt").read_text())
    assert pins == ["libtpu", "setuptools"], "the extra tpu, and what builds the editable install"


def test_the_image_is_plain_and_keeps_no_secret() -> None:
    ((base,),) = words_of("FROM")
    assert base.startswith("python:3.11-slim")
    names = [name for name, _ in instructions()]
    assert words_of("USER") == [["r1re"]] and names.index("USER") > names.index("RUN")
    assert "ARG" not in names and "ADD" not in names
    set_ = [word.split("=")[0] for words in words_of("ENV") for word in words]
    assert not [name for name in set_ if re.search("TOKEN|KEY|SECRET|PASS", name)]
