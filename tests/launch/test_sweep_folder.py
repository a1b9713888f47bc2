"""Whose the folder of a sweep is, and what of it is done."""

import fcntl
import json
import pathlib
import subprocess
import sys

import pytest

from r1re_jax.launch.sweep import Member, expand
from r1re_jax.launch.sweep_folder import (
    MEMBERS_LOCK,
    LockedError,
    check_members,
    check_record,
    is_done,
    locked,
    write_record,
)
from r1re_jax.train.settings import Settings
from r1re_jax.train.workdir import WorkdirError, open_workdir
from tests.train.world import settings


def begun(folder: pathlib.Path, name: str, one: Settings, step: int | None) -> pathlib.Path:
    """A member's work directory with a checkpoint."""
    workdir = open_workdir(folder / name, one, data={"train.jsonl": "abc"})
    if step is not None:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    return workdir


def members(*values: int) -> tuple[Member, ...]:
    return expand({"seed": list(values)}).members


def never() -> None:
    raise AssertionError("nothing to wait for")


def test_a_run_is_done_when_its_last_checkpoint_is_there(tmp_path: pathlib.Path) -> None:
    one = settings(tmp_path, grpo__steps=3)
    assert not is_done(tmp_path / "new", one)
    assert not is_done(begun(tmp_path, "a", one, None), one)
    assert not is_done(begun(tmp_path, "b", one, 4), one)
    assert is_done(begun(tmp_path, "c", one, 5), one)
    longer = settings(tmp_path, grpo__steps=4)
    assert not is_done(tmp_path / "c", longer), "a sweep can be extended"


def test_a_run_that_stopped_in_its_last_evaluation_is_not_done(tmp_path: pathlib.Path) -> None:
    one = settings(tmp_path, evaluate__samples=1)
    workdir = begun(tmp_path, "a", one, 4)
    meta = workdir / "checkpoints" / "4" / "meta" / "metadata"
    meta.parent.mkdir()
    meta.write_text(json.dumps({"step": 4, "pending": {"reward": 1.0}}))
    assert not is_done(workdir, one)
    (workdir / "metrics.jsonl").write_text('{"step": 3}\n{"st')
    assert not is_done(workdir, one)
    (workdir / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    assert is_done(workdir, one), "the checkpoint is not written again"
    meta.write_text(json.dumps({"step": 4, "pending": None}))
    assert is_done(workdir, one)


def test_members_that_began_with_other_settings_are_refused(tmp_path: pathlib.Path) -> None:
    begun(tmp_path, "seed=3", settings(tmp_path), 4)
    check_members(tmp_path, {"seed=3": settings(tmp_path), "seed=4": settings(tmp_path, seed=4)})
    check_members(tmp_path, {"seed=3": settings(tmp_path, checkpoint__every=2)})
    with pytest.raises(WorkdirError, match=r"grpo\.learning_rate is 0\.01 there and 0\.5 here"):
        check_members(tmp_path, {"seed=3": settings(tmp_path, grpo__learning_rate=0.5)})
    with pytest.raises(WorkdirError, match=r"evaluate\.samples is 0 there and 2 here"):
        check_members(tmp_path, {"seed=3": settings(tmp_path, evaluate__samples=2)})


def test_members_may_come_and_those_that_began_may_not_go(tmp_path: pathlib.Path) -> None:
    check_record(tmp_path, members(0, 1))
    write_record(tmp_path, members(0, 1))
    assert json.loads((tmp_path / "sweep.json").read_text())["seed=0"] == {"seed": 0}
    check_record(tmp_path, members(0, 1, 2))
    check_record(tmp_path, members(1))
    begun(tmp_path, "seed=0", settings(tmp_path), 1)
    with pytest.raises(WorkdirError, match="does not have any more: seed=0"):
        check_record(tmp_path, members(1))
    with pytest.raises(WorkdirError, match="does not have any more: seed=0"):
        check_record(tmp_path, (Member(name="seed=0", overrides={"seed": "0"}),))


def test_two_sweeps_are_kept_apart(tmp_path: pathlib.Path) -> None:
    with locked(tmp_path, wait=never):
        with pytest.raises(LockedError, match=r"another run\.sweep is at work in .*: process \d+"):
            with locked(tmp_path, wait=never):
                pass
    with locked(tmp_path, wait=never):
        pass


def test_a_member_that_outlives_its_sweep_is_waited_for(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / MEMBERS_LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-c", "input()"]
        member = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(held.fileno(),))
    waits = []

    def wait() -> None:
        waits.append(None)
        if len(waits) == 2:
            member.communicate(b"\n")

    with locked(tmp_path, wait=wait):
        assert len(waits) == 2
