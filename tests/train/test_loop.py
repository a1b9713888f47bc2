"""Whole runs: resumed ones equal uninterrupted ones bit by bit, and every step is written once."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from r1re_jax.model.config import PRESETS
from r1re_jax.policy_files import load_policy
from r1re_jax.task import tasks
from r1re_jax.task.rewards import Verdict
from r1re_jax.tokenizer import load_tokenizer
from r1re_jax.train import loop as loop_module
from r1re_jax.train.config import read_settings
from r1re_jax.train.settings import Settings
from r1re_jax.train.start import load_start
from r1re_jax.train.update import NonFiniteError
from r1re_jax.train.workdir import WorkdirError
from tests.tiny import tiny_config, tiny_guide
from tests.train import world
from tests.train.world import StopAt, assert_bit_equal, checkpoint_params, metrics, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVALUATED = {
    "evaluate": {"every": 0, "samples": 2, "batch": 2, "greedy": True},
    "checkpoint__best": "held/mean_reward",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return world.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def settings(inputs: pathlib.Path) -> Settings:
    return world.settings(inputs, **EVALUATED)


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work directory of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train(settings, workdir)
    assert (outcome.step, outcome.steps, outcome.stopped) == (4, 4, None)
    return workdir


def _assert_same_run(workdir: pathlib.Path, expected: pathlib.Path, *, step: int = 4) -> None:
    assert_bit_equal(checkpoint_params(workdir, step), checkpoint_params(expected, step))
    assert metrics(workdir) == metrics(expected)
    for folder in ("completions", "eval"):
        files = {
            str(path.relative_to(expected)): path.read_bytes()
            for path in (expected / folder).rglob("*")
            if path.is_file()
        }
        found = {
            str(path.relative_to(workdir)): path.read_bytes()
            for path in (workdir / folder).rglob("*")
            if path.is_file()
        }
        assert found == files


def test_a_run_leaves_what_it_promises(whole: pathlib.Path, settings: Settings) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row.get("phase") for row in rows] == [None, "sft", "sft", "grpo", "grpo"]
    evaluated = [row["step"] for row in rows if "eval/held/avg_at_k" in row]
    assert evaluated == [0, 2, 4], "before, after SFT, after GRPO"
    assert all("eval/held/greedy_accuracy" in rows[step] for step in evaluated)
    assert sorted(path.name for path in (whole / "completions").iterdir()) == ["3.jsonl", "4.jsonl"]
    folders = sorted(path.name for path in (whole / "eval").iterdir())
    assert folders == ["0-held", "2-held", "4-held"]
    assert (whole / "eval" / "4-held" / "metrics.json").is_file()
    assert (whole / "reference" / "2").is_dir(), "the policy that GRPO began with"
    kept = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    assert {3, 4} <= kept
    recipe = json.loads((whole / "policy" / "r1re.json").read_text())
    assert recipe["limits"] == dataclasses.asdict(settings.limits)
    assert recipe["guide_sha256"] == {"Tiny": tiny_guide().sha256}
    assert not (whole / "profile").exists(), "nobody asked for a trace"


def test_the_work_directory_is_a_policy(whole: pathlib.Path) -> None:
    policy = load_policy(whole, step=4)
    params = checkpoint_params(whole, 4)
    np.testing.assert_array_equal(policy.model.embed[...], params["embed"])
    assert policy.limits == world.LIMITS


def test_stopping_anywhere_changes_nothing(
    settings: Settings, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stops = [
        (StopAt("held", 1), 0),  # in the evaluation before the first step
        (StopAt("update", 2), 1),  # in the second SFT step
        (StopAt("held", 1), 2),  # in the evaluation between the phases
        (StopAt("rollout", 1), 2),  # in the first rollout of the first GRPO step
        (StopAt("reward", 3), 3),  # in the second GRPO step
        (StopAt("reference", 1), 3),
    ]
    for stop, step in stops:
        outcome = train(settings, tmp_path, poll=stop.poll, progress=stop)
        assert (outcome.step, outcome.stopped.exit_code) == (step, 143)
        rows = [row["step"] for row in metrics(tmp_path)]
        assert len(rows) == len(set(rows))
    assert train(settings, tmp_path).step == 4
    _assert_same_run(tmp_path, whole)


def test_a_kill_changes_nothing(
    inputs: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    class Killed(BaseException):
        pass

    seldom = world.settings(inputs, **EVALUATED, checkpoint__every=0)
    stop = StopAt("rollout", 10)

    def kill() -> None:
        if stop.reached:
            raise Killed

    with pytest.raises(Killed):
        train(seldom, tmp_path, progress=stop, poll=kill)
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3], "killed in step 4"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert train(seldom, tmp_path).step == 4
    _assert_same_run(tmp_path, whole)


def test_a_run_can_be_extended(
    inputs: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    quiet = {"evaluate__samples": 0}
    short = world.settings(inputs, grpo__steps=1, **quiet)
    assert train(short, tmp_path).step == 3
    longer = world.settings(inputs, grpo__steps=2, **quiet)
    assert train(longer, tmp_path).step == 4
    assert train(longer, tmp_path).step == 4, "and a finished one is left alone"
    assert_bit_equal(checkpoint_params(tmp_path, 4), checkpoint_params(whole, 4))
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


def test_another_configuration_or_a_lost_reference_is_refused(
    inputs: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    with pytest.raises(WorkdirError, match="grpo.group is 2 there and 3 here"):
        train(world.settings(inputs, **EVALUATED, grpo__group=3), copy)
    shutil.rmtree(copy / "reference")
    with pytest.raises(FileNotFoundError, match="the reference policy of this run"):
        train(world.settings(inputs, **EVALUATED, grpo__steps=3), copy)


def test_bad_input_leaves_no_work_directory(inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bad = ({"limits__question": 3}, {"model__path": "absent"}, {"grpo__questions": 17})
    for changes in bad:
        with pytest.raises(ValueError):
            train(world.settings(inputs, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_what_is_not_finite_stops_the_run_and_is_written_down(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Verdict(float("nan"), False, False, None, None)
    monkeypatch.setattr(tasks, "relation_reward", lambda *_, **__: bad)
    settings = world.settings(inputs, sft__steps=1, grpo__kl_coefficient=0.0)
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan"):
        train(settings, tmp_path)
    note = json.loads((tmp_path / "nonfinite-2.json").read_text())
    assert note["step"] == 2 and len(note["prompts"][0]["ids"]) == 2
    assert [row["step"] for row in metrics(tmp_path)] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "reference").exists(), "no KL term, no reference"


def test_the_best_checkpoint_is_kept(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2}
    monkeypatch.setattr(
        loop_module, "evaluate", lambda *args, step, **more: {"accuracy": scores[step]}
    )
    settings = world.settings(
        inputs,
        sft__steps=4,
        grpo__steps=0,
        evaluate={"every": 1, "samples": 1},
        checkpoint={"every": 0, "keep": 1, "best": "held/accuracy"},
    )
    train(settings, tmp_path)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 4], "the best of training, saved as it came, and the last"
    assert load_policy(tmp_path).provenance.endswith("step 2")


def test_a_run_can_start_from_random_weights(
    inputs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = len(load_tokenizer(inputs / "base"))
    monkeypatch.setitem(PRESETS, "tiny", tiny_config(vocab=vocab))
    values: dict[str, Any] = world.config(inputs)
    values |= {"model": {"preset": "tiny"}, "tokenizer": str(inputs / "base")}
    start = load_start(read_settings(values), mesh=world.one_device_mesh(), guides=(), fresh=True)
    assert start.policy.limits == world.LIMITS and start.policy.guide_sha256 == {}
    assert start.params["embed"].shape == (vocab, 16)
    again = load_start(read_settings(values), mesh=world.one_device_mesh(), guides=(), fresh=False)
    assert again.params is None


def _main(name: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"run.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_a_run_is_exported_once(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    flags = (f"--workdir={whole}", f"--out={tmp_path / 'policy'}")
    done = _main("export", *flags, "--step=3")
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    rows = [[1, 2, 3], [5]]
    expected = load_policy(whole, step=3).logits(rows)
    for ours, theirs in zip(load_policy(tmp_path / "policy").logits(rows), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = _main("export", *flags)
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr
    nothing = _main("export", f"--workdir={tmp_path}", f"--out={tmp_path / 'other'}")
    assert nothing.returncode == 1 and "run.export:" in nothing.stderr
    assert "Traceback" not in again.stderr + nothing.stderr


def test_a_config_is_shown_with_its_parameters(
    inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    recipe = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict("
    (tmp_path / "config.py").write_text(f"{recipe}{world.config(inputs)!r})\n")
    more = "--config.grpo.group=5", f"--json={tmp_path / 'shown.json'}"
    done = _main("show", f"--config={tmp_path / 'config.py'}", *more)
    assert done.returncode == 0, done.stderr
    _, _, table = done.stdout.partition("hash ")
    assert json.loads((tmp_path / "shown.json").read_text())["config"]["grpo"]["group"] == 5
    assert "layers.query.weight" in table and table.rstrip().splitlines()[-1].startswith("total")
    bad = _main("show", f"--config={tmp_path / 'config.py'}", "--config.grpo.group=1")
    assert bad.returncode == 1 and "it must be at least 2" in bad.stderr


def test_what_lies_on_the_host_changes_no_bit(
    inputs: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    away = {"moments_on_host": True, "reference_on_host": True}
    settings = world.settings(inputs, **EVALUATED, mesh=away)
    stop = StopAt("update", 3)
    assert train(settings, tmp_path, poll=stop.poll, progress=stop).step < 4
    assert train(settings, tmp_path).step == 4
    _assert_same_run(tmp_path, whole)
