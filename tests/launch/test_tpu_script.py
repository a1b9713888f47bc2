"""run/tpu.sh against a fake gcloud: the calls of a whole life, and what is said when one fails."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.slice import COMMAND, ROOT, SECRETS, WHERE, Slice

VERBS = ("create", "setup", "launch", "logs", "status", "watch", "delete")
QUEUED = f"compute tpus queued-resources describe r1re {WHERE}"
QUEUED += " --format=value(state.state,state.failedData.error.message)"
NODE = f"compute tpus tpu-vm describe r1re {WHERE} --format=value(state,networkEndpoints.len())"
UP = [QUEUED, NODE]
CREATE = f"compute tpus queued-resources create r1re --node-id=r1re {WHERE}"
CREATE += " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
DELETE = f"compute tpus queued-resources delete r1re {WHERE} --force --quiet"
TO_DELETE = f"gcloud {DELETE}"


def ssh(command: str, worker: str = "all") -> str:
    """A call that runs a command on workers."""
    return f"compute tpus tpu-vm ssh r1re {WHERE} --worker={worker} --quiet --command={command}"


def scp(name: str) -> str:
    """A call that copies a temporary file to all workers."""
    return f"compute tpus tpu-vm scp SCRATCH/{name} r1re:r1re/{name} {WHERE} --worker=all --quiet"


UNPACK = ssh(
    "if tmux has-session -t =r1re 2>/dev/null; then echo 'a run goes on here' >&2; exit 1; fi;"
    " mkdir -p r1re/code && find r1re/code -mindepth 1 -maxdepth 1 ! -name .venv ! -name .cache"
    " -exec rm -rf {} + && tar -xzf r1re/code.tar.gz -C r1re/code"
    " && bash r1re/code/run/tpu_worker.sh setup"
)
LOOK = ssh("bash r1re/code/run/tpu_worker.sh state")
START = "bash r1re/code/run/tpu_worker.sh start "
SETUP = [*UP, ssh("mkdir -p -m 700 r1re"), scp("code.tar.gz"), UNPACK]


@pytest.fixture
def slice_(tmp_path: pathlib.Path) -> Slice:
    """A project without a slice, seen from a shell that holds secrets."""
    return Slice(tmp_path, variables=dict(SECRETS))


def test_a_whole_life_makes_exactly_these_calls(slice_: Slice) -> None:
    said = slice_.done("create")
    assert slice_.calls() == [CREATE, QUEUED, QUEUED, NODE]
    assert "waiting: queued resource WAITING_FOR_RESOURCES" in said

    slice_.done("setup")
    assert slice_.calls() == SETUP

    slice_.done("launch", "--", *COMMAND)
    start = [scp("env"), ssh(START + "-- " + " ".join(COMMAND))]
    assert slice_.calls() == start

    slice_.change(run=["running", "running", "ended 0"], preempt_at=[1])
    said = slice_.done("watch")
    look, lost = [*UP, LOOK], [QUEUED]
    again = [QUEUED, DELETE, NODE, CREATE, QUEUED, *SETUP]
    resume = [scp("env"), ssh(START + "--replace -- " + " ".join(COMMAND))]
    assert slice_.calls() == look * 2 + lost + again + resume + look * 3 + UP
    assert "queued resource SUSPENDED); re-creation 1 of 20" in said
    assert "the run has finished on all workers" in said and "costs money now" in said

    said = slice_.done("delete", "--yes")
    assert slice_.calls() == [QUEUED, DELETE, NODE]
    assert "nothing named r1re is left" in said
    assert not (slice_.folder / "state" / "r1re").exists()

    slice_.done("delete", "--yes")
    assert slice_.calls() == UP, "deleting what is not there is no failure"
    assert not list((slice_.folder / "tmp").iterdir())


def test_the_code_is_that_of_the_commit_and_of_no_other(slice_: Slice) -> None:
    first = slice_.commit()
    (slice_.repository / "later.txt").write_text("x")
    slice_.done("create")
    said = slice_.done("setup", f"--commit={first[:10]}")
    assert "uncommitted changes" in said and f"all workers have {first[:12]}" in said
    listing = ["tar", "-tzf", str(slice_.folder / "fake" / "1-code.tar.gz")]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    assert "run/tpu_worker.sh" in names and "later.txt" not in names
    slice_.commit()
    assert "uncommitted" not in slice_.done("setup")
    result = slice_.run("setup", "--commit=none")
    assert result.returncode == 1 and "no commit 'none'" in result.stderr
    assert "costs money now" in result.stderr


def test_secrets_reach_the_workers_and_nothing_else(slice_: Slice) -> None:
    slice_.variables["MORE"] = "m0re"
    slice_.done("create")
    slice_.done("setup")
    said = slice_.run("launch", "--env=MORE", "--", *COMMAND)
    slice_.change(run=["running", "ended 0"], preempt_at=[0])
    watched = slice_.run("watch", "--delete-after")
    assert watched.returncode == 0, watched.stderr
    dry = slice_.run("launch", "--dry-run", "--env=MORE")
    assert "HF_TOKEN=****" in dry.stdout and "MORE=****" in dry.stdout
    sent = sorted((slice_.folder / "fake").glob("*-env"))
    assert len(sent) == 2
    for path in sent:
        assert path.stat().st_mode & 0o077 == 0
        read = ["bash", "-c", f'. {path}; printf "%s\\n" "$HF_TOKEN" "$WANDB_API_KEY" "$MORE"']
        values = subprocess.run(read, capture_output=True, text=True, env={}, check=True).stdout
        assert values.splitlines() == [SECRETS["HF_TOKEN"], SECRETS["WANDB_API_KEY"], "m0re"]
        path.unlink()
    texts = [result.stdout + result.stderr for result in (said, watched, dry)]
    everything = "".join([*texts, *_files(slice_.folder)])
    for word in ("s3cret", "k3y", "m0re"):
        assert word not in everything


def _files(folder: pathlib.Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [path.read_bytes().decode(errors="replace") for path in paths]


def test_what_is_remembered_holds_names_alone(slice_: Slice) -> None:
    slice_.launch()
    state = slice_.folder / "state" / "r1re"
    assert "passed=R1RE_DATA HF_TOKEN WANDB_API_KEY" in (state / "settings").read_text()
    assert not [text for text in _files(state) if "s3cret" in text or "k3y" in text]
    del slice_.variables["HF_TOKEN"]
    result = slice_.run("watch")
    assert result.returncode == 1 and "launched with HF_TOKEN" in result.stderr


def test_a_secret_in_the_command_is_refused_unsaid(slice_: Slice) -> None:
    for arguments in (
        ["launch", "--", "env", f"HF_TOKEN={SECRETS['HF_TOKEN']}", "python"],
        ["launch", "--env=HF_TOKEN=" + SECRETS["HF_TOKEN"]],
        ["launch", "--hf-token=" + SECRETS["HF_TOKEN"]],
        ["launch", SECRETS["HF_TOKEN"]],
    ):
        result = slice_.run(*arguments)
        assert result.returncode != 0
        assert "s3cret" not in result.stdout + result.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("path", ["", None], ids=["empty", "tools"])
def test_a_dry_run_needs_nothing_and_does_nothing(tmp_path, verb, path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "git", "sed", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    home = tmp_path / "home"
    home.mkdir()
    result = subprocess.run(
        [str(shutil.which("bash")), ROOT / "run" / "tpu.sh", verb, "--dry-run"],
        env={"PATH": str(tools) if path is None else path, "HOME": str(home), **SECRETS}
        | {"TMPDIR": str(home), "R1RE_TPU_STATE": str(home / "state")},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    known = ("gcloud compute tpus ", "git archive ")
    assert lines and all(line.startswith(known) for line in lines)
    assert all("--project=PROJECT --zone=ZONE" in line for line in lines if line[:2] == "gc")
    assert not list(home.iterdir())
    assert "s3cret" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_follows_the_type(slice_: Slice, kind, runtime) -> None:
    said = slice_.run("create", f"--type={kind}", "--dry-run").stdout
    assert f"--accelerator-type={kind} --runtime-version={runtime} --spot" in said


def test_tiers_and_flags_of_create(slice_: Slice) -> None:
    on_demand = slice_.run("create", "--on-demand", "--zone", "z2", "--dry-run").stdout
    assert "--spot" not in on_demand and "--zone=z2" in on_demand
    reserved = slice_.run(
        "create", "--reserved", "--runtime=r", "--valid-until-duration=6h", "--dry-run"
    ).stdout
    assert "--runtime-version=r --reserved --valid-until-duration=6h" in reserved
    said = slice_.done("create", "--wait=0", "--name=other")
    assert len(slice_.calls()) == 1 and "costs begin when it is granted" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no verb"),
        (["lunch"], "unknown verb 'lunch'; the nearest is launch"),
        (["crate", "--dry-run"], "the nearest is create"),
        (["create", "--on-demnd"], "create takes no --on-demnd; the nearest is --on-demand"),
        (["delete", "--type=v6e-8"], "delete takes no --type"),
        (["create", "--type=h100-8"], "unknown type 'h100-8'"),
        (["create", "--spot=yes"], "--spot takes no value"),
        (["logs", "--worker"], "--worker takes a value"),
        (["logs", "--worker=two"], "--worker: a number or all"),
        (["watch", "--max-recreations=many"], "must be a whole number"),
        (["status", "--name=R1"], "--name: small letters"),
        (["launch", "--"], "no command after --"),
        (["setup", "--", "ls"], "in launch alone"),
    ],
)
def test_what_is_not_understood_is_refused(slice_: Slice, arguments, said) -> None:
    result = slice_.run(*arguments)
    assert result.returncode == 2
    assert said in result.stderr and "usage: bash run/tpu.sh VERB" in result.stderr
    assert not slice_.calls()


def test_a_placeholder_is_for_dry_runs_alone(slice_: Slice) -> None:
    slice_.variables["R1RE_TPU_PROJECT"] = ""
    slice_.variables["CLOUDSDK_CORE_PROJECT"] = ""
    result = slice_.run("create")
    assert result.returncode == 2 and "no project: give --project" in result.stderr
    result = slice_.run("launch", "--project=p1")
    assert result.returncode == 1 and "no work directory" in result.stderr


def test_a_name_is_not_made_anew_elsewhere(slice_: Slice) -> None:
    slice_.done("create")
    result = slice_.run("create", "--zone=z2")
    assert result.returncode == 1
    assert "r1re is remembered in project p1, zone z1" in result.stderr
    assert "node r1re in state READY: costs money now" in result.stderr
    slice_.variables["CLOUDSDK_COMPUTE_ZONE"] = "z9"
    assert "zone z1" in slice_.done("status"), "what is remembered comes before the environment"


def test_help_names_every_verb(slice_: Slice) -> None:
    said = slice_.run("--help").stdout
    assert all(f"\n  {verb} " in said for verb in VERBS)
    assert slice_.run("watch", "--help").stdout == said


def test_logs_and_status(slice_: Slice) -> None:
    slice_.launch()
    slice_.done("logs", "--worker=all", "--lines=5", "--follow")
    assert slice_.calls() == [ssh("tail -n 5 -F r1re/log")]
    said = slice_.done("status")
    assert "r1re is up: running: t1v-w-0 running; t1v-w-1 running" in said
    assert "node r1re in state READY: costs money now, until it is deleted" in said
    slice_.done("delete", "--force")
    said = slice_.done("status")
    assert "nothing named r1re: nothing costs money" in said


def test_a_signal_while_waiting_says_what_is_in_the_queue(slice_: Slice) -> None:
    slice_.change(queue=["WAITING_FOR_RESOURCES"] * 99)
    slice_.variables["R1RE_TPU_POLL"] = "30"
    with subprocess.Popen(
        ["bash", slice_.repository / "run" / "tpu.sh", "create"],
        env=slice_.environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "waiting" not in process.stderr.readline():
            pass
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 143
    assert "WAITING_FOR_RESOURCES: costs nothing yet, and money as soon as it is granted" in said
    assert TO_DELETE in said
