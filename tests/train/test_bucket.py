"""Runs whose work directory, data and policy are in a bucket equal those on this machine."""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from etils import epath

from r1re_jax import files
from r1re_jax.evaluate import evaluate
from r1re_jax.files import place, read_text
from r1re_jax.policy_files import load_policy
from r1re_jax.policy_source import PolicyError, saved_steps
from r1re_jax.report.writers import JsonlWriter
from r1re_jax.task.readers import read_jsonl
from r1re_jax.task.relations import load_guide
from r1re_jax.train.checkpoint import keep_reference
from r1re_jax.train.settings import Settings
from r1re_jax.train.workdir import WorkdirError
from tests.fake_gcs import FakeGCS
from tests.train import world
from tests.train.world import StopAt, assert_bit_equal, checkpoint_params, metrics, train

EVALUATED = {
    "evaluate": {"every": 0, "samples": 2, "batch": 2, "greedy": True},
    "checkpoint__best": "held/mean_reward",
}
ROOT = pathlib.Path(__file__).resolve().parents[2]
Command = Callable[..., None]


@pytest.fixture(scope="module")
def root(gcs: FakeGCS) -> epath.Path:
    """A bucket with inputs/."""
    gcs.buckets["runs"] = {}
    world.write_inputs(place("gs://runs/inputs"))
    return place("gs://runs")


@pytest.fixture(scope="module")
def settings(root: epath.Path) -> Settings:
    return world.settings(root / "inputs", **EVALUATED)


@pytest.fixture(scope="module")
def local(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work directory on this machine of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "local"
    assert train(settings, workdir).step == 4
    return workdir


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def workdir(settings: Settings, root: epath.Path, gcs: FakeGCS) -> epath.Path:
    """A work directory in a bucket, of a run that was stopped, killed and went on."""
    workdir = root / "run"
    stop = StopAt("update", 2)
    outcome = train(settings, workdir, poll=stop.poll, progress=stop)
    assert (outcome.step, outcome.stopped.exit_code) == (1, 143)
    stop = StopAt("rollout", 10)

    def kill() -> None:
        if stop.reached:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        # A process that is killed closes nothing, and so uploads no more of its lines.
        patch.setattr(JsonlWriter, "close", lambda writer: None)
        train(settings, workdir, poll=kill, progress=stop)
    assert [row["step"] for row in metrics(workdir)] == [0, 1, 2, 3], "as many as are saved"
    assert saved_steps(workdir) == [2, 3]
    gcs.put(f"{workdir}/checkpoints/9/params/d/part", b"of what Orbax had not finished")
    gcs.put(f"{workdir}/completions/9.jsonl", b"{}\n")
    gcs.put(f"{workdir}/eval/9-held/predictions.jsonl", b"{}\n")
    assert saved_steps(workdir) == [2, 3]
    assert train(settings, workdir).step == 4
    return workdir


def _tree(folder: pathlib.Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_in_a_bucket_equals_one_of_this_machine(
    workdir: epath.Path, local: pathlib.Path
) -> None:
    assert_bit_equal(checkpoint_params(workdir, 4), checkpoint_params(local, 4))
    assert metrics(workdir) == metrics(local)
    with files.fetched(workdir) as here:
        for folder in ("completions", "eval", "policy"):
            assert _tree(here / folder) == _tree(local / folder)
        names = {path.split("/")[0] for path in _tree(here)}
    assert names == {path.split("/")[0] for path in _tree(local)}
    assert read_text(workdir / "config.json").startswith("{")
    kept = {int(path.name) for path in files.children(workdir / "checkpoints")}
    assert kept == set(saved_steps(workdir)), "what was not finished is gone"


def test_another_configuration_is_refused(workdir: epath.Path, root: epath.Path) -> None:
    other = world.settings(root / "inputs", **EVALUATED, sft__learning_rate=1.0)
    with pytest.raises(WorkdirError, match="gs://runs/run is of another configuration"):
        train(other, workdir)


def test_a_work_directory_in_a_bucket_is_a_policy(workdir: epath.Path) -> None:
    policy = load_policy(str(workdir), step=4)
    assert_bit_equal(
        {"embed": policy.model.embed[...]}, {"embed": checkpoint_params(workdir, 4)["embed"]}
    )
    with pytest.raises(PolicyError, match="has no checkpoint of step 9"):
        load_policy(workdir, step=9)


def test_a_reference_that_was_not_finished_is_written_anew(bucket: str, gcs: FakeGCS) -> None:
    _, params = world.layout_on(world.one_device_mesh())
    gcs.put(f"{bucket}/reference/2/d/part", b"")
    keep_reference(f"{bucket}", params, step=2)
    names = gcs.names(f"{bucket}/reference/2")
    assert "commit_success.txt" in names
    assert "d/part" not in names
    written = len(gcs.requests)
    keep_reference(f"{bucket}", params, step=2)
    assert not [method for method, _ in gcs.requests[written:] if method != "GET"]


def test_report_reads_and_writes_a_bucket(
    command: Command,
    workdir: epath.Path,
    local: pathlib.Path,
    gcs: FakeGCS,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command("report", f"--workdir={workdir}")
    assert capsys.readouterr().out == f"{workdir}/report.html\n"
    assert b"<html" in gcs.read(f"{workdir}/report.html")
    command("report", f"--workdir={local}")
    assert gcs.names(f"{workdir}/curves") == sorted(p.name for p in (local / "curves").iterdir())


def test_an_evaluation_in_a_bucket_goes_on(
    workdir: epath.Path, root: epath.Path, bucket: str, tmp_path: pathlib.Path
) -> None:
    policy, guide = load_policy(workdir), load_guide(root / "inputs" / "guide.md")
    examples = read_jsonl(root / "inputs" / "train.jsonl", schema=guide.schema)[:6]
    how = {"name": "tiny", "samples": 2, "batch": 2}
    expected = evaluate(policy, examples, guide, out=tmp_path, **how)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if seen == [2, 4]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, examples, guide, out=f"{bucket}/out", on_batch=stop, **how)
    assert evaluate(policy, examples, guide, out=f"{bucket}/out", on_batch=stop, **how) == expected
    assert seen == [2, 4, 6], "what was drawn is not drawn again"
    with files.fetched(place(f"{bucket}/out")) as here:
        assert _tree(here) == _tree(tmp_path)


def test_evaluate_and_export_work_on_buckets(
    command: Command,
    workdir: epath.Path,
    root: epath.Path,
    bucket: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [f"--data={root}/inputs/test.jsonl", f"--guide={root}/inputs/guide.md"]
    command("evaluate", f"--model={workdir}", *given, f"--out={bucket}/of-run")
    command("export", f"--workdir={workdir}", f"--out={bucket}/export")
    assert f"to {bucket}/export" in capsys.readouterr().out
    command("export", f"--workdir={workdir}", f"--out={tmp_path / 'export'}")
    with files.fetched(place(f"{bucket}/export")) as here:
        assert _tree(here) == _tree(tmp_path / "export")
    command("evaluate", f"--model={bucket}/export", *given, f"--out={bucket}/of-export")
    written = (place(f"{bucket}/of-{of}/predictions.jsonl") for of in ("run", "export"))
    predictions = [read_text(path) for path in written]
    assert predictions[0] == predictions[1]
    metrics = json.loads(read_text(place(f"{bucket}/of-run/metrics.json")))
    assert metrics["n"] == 3
    with pytest.raises(SystemExit, match=r"run\.export: gs://.* exists and is not empty"):
        command("export", f"--workdir={workdir}", f"--out={bucket}/export")
    with pytest.raises(SystemExit, match="--push uploads a folder of this machine"):
        command("export", f"--workdir={workdir}", f"--out={bucket}/other", "--push=Lab/x")


def test_commands_say_which_bucket_is_missing(command: Command, root: epath.Path) -> None:
    given = [f"--data={root}/inputs/test.jsonl", f"--guide={root}/inputs/guide.md"]
    missing = r"there is no bucket gs://nowhere: [^\n]*$"
    train = [sys.executable, "-m", "run.train", "--config=configs/miniworld.py"]
    train += ["--workdir=gs://nowhere/run"]
    process = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert re.search(r"run\.train: " + missing, process.stderr.strip())
    with pytest.raises(SystemExit, match=r"run\.report: " + missing):
        command("report", "--workdir=gs://nowhere/run")
    with pytest.raises(SystemExit, match=r"run\.export: " + missing):
        command("export", "--workdir=gs://nowhere/run", "--out=gs://runs/out")
    with pytest.raises(SystemExit, match=r"run\.evaluate: " + missing):
        command("evaluate", "--model=gs://nowhere/run", *given, "--out=gs://runs/out")
    with pytest.raises(SystemExit, match=r"run\.evaluate: " + missing):
        command("evaluate", "--model=m", "--data=gs://nowhere/d", given[1], "--out=gs://runs/out")
