"""A real process of run.train: SIGTERM inside a rollout saves, and the printed command resumes."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

from tests.simulated import xla_flags
from tests.train import world

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_inside_a_rollout_saves_and_the_printed_command_resumes(
    tmp_path: pathlib.Path,
) -> None:
    inputs = world.write_inputs(tmp_path)
    # A step is nearly all rollout: long completions, a boundary after every token. SFT alone saves.
    values = world.config(inputs, grpo__steps=10_000, grpo__chunk=1, limits__completion=200)
    values["checkpoint"] = {"every": 0, "keep": 1}
    values["sft"]["steps"] = 1
    recipe = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict("
    (tmp_path / "config.py").write_text(f"{recipe}{values!r})\n")
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "run.train", f"--config={tmp_path / 'config.py'}"]
    command += [f"--workdir={workdir}"]
    process = _start(command)
    numbers = workdir / "metrics.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (numbers.exists() and '"step": 2' in numbers.read_text()):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    farewell = re.search(r"SIGTERM: stopped after step (\d+) of 10001\. Resume with: (.*)", err)
    assert farewell, err
    step = int(farewell[1])
    saved = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert saved == [str(step)], "the step before the rollout, though no save was due"

    again = shlex.split(farewell[2])
    assert again == command
    process = _start([*again, f"--config.grpo.steps={step}"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"finished at step {step + 1} of {step + 1}" in out
    steps = [json.loads(line)["step"] for line in numbers.read_text().splitlines()]
    assert steps == [*range(1, step + 2)], "each step once"


def test_bad_input_ends_with_one_line_that_names_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'grpo': {'lerning_rate': 1.0}})\n"
    )
    command = [sys.executable, "-m", "run.train", f"--config={tmp_path / 'config.py'}"]
    process = _start([*command, f"--workdir={tmp_path / 'run'}"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "unknown key grpo.lerning_rate; did you mean grpo.learning_rate?" in err
    assert "Traceback" not in err and not (tmp_path / "run").exists()
