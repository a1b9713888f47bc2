"""The folder of a sweep: whose it is, which members it has, and what these have done.

Two locks: one is the sweep's own, the other its members' too, since they hold the descriptor open.
So a sweep that was killed is told from one at work, and its members save before the next begins.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from r1re_jax import files
from r1re_jax.launch.sweep import Member
from r1re_jax.policy_source import CHECKPOINTS
from r1re_jax.train.config import differences, read_settings, resolved
from r1re_jax.train.settings import Settings
from r1re_jax.train.workdir import CONFIG, WorkdirError, check_workdir, newest_step, read_config

RECORD, LOCK, MEMBERS_LOCK = "sweep.json", ".sweep.lock", ".members.lock"
# What figures of two runs depend on beside the run: where it differs they do not compare.
MEASURED = ("evaluate.samples", "evaluate.temperature", "evaluate.greedy", "data.eval.")
WAIT_SECONDS = 0.1


class LockedError(RuntimeError):
    """Another sweep is at work in the folder."""


def steps_done(workdir: Path) -> int:
    """Return the steps that a run would not do again."""
    return newest_step(workdir) or 0


def is_done(workdir: Path, settings: Settings) -> bool:
    """Whether a run has nothing left to do: its last step is saved, and evaluated.

    A run that was asked to stop inside its last evaluation has saved the step with the figures that
    are still to be written down; their line in metrics.jsonl follows the evaluation.
    """
    newest = newest_step(workdir)
    if newest is None or newest < settings.steps or not (workdir / CONFIG).exists():
        return False
    meta = workdir / CHECKPOINTS / str(newest) / "meta" / "metadata"
    if not meta.exists() or json.loads(meta.read_text("utf-8")).get("pending") is None:
        return True
    line_is_due = settings.evaluate.samples > 0 or newest % settings.log.every == 0
    return not line_is_due or _has_line(workdir / "metrics.jsonl", newest)


def check_members(folder: Path, settings: Mapping[str, Settings]) -> None:
    """Check that what members have done is of these settings; change nothing.

    Beside what `check_workdir` refuses the evaluations must be alike: they stand in one table.

    Raises:
        WorkdirError: a member has begun with other settings.
    """
    for name, one in settings.items():
        workdir = folder / name
        if not (workdir / CONFIG).exists():
            continue
        before = read_config(workdir)
        # A finished member reads no data any more; one that goes on checks its data itself.
        check_workdir(workdir, one, data=before.get("data", {}))
        changed = differences(resolved(read_settings(before["config"])), resolved(one))
        lines = [
            f"{key} is {old!r} there and {new!r} here"
            for key, (old, new) in changed.items()
            if key.startswith(MEASURED)
        ]
        if lines:
            listed = "\n  ".join(lines)
            raise WorkdirError(
                f"{workdir} is evaluated in another way:\n  {listed}\nIts figures could not be"
                " compared. Choose another folder for the sweep, or give these their old values."
                " Nothing was changed."
            )


def check_record(folder: Path, members: Sequence[Member]) -> None:
    """Check that every member that has begun in a folder is still one of the sweep; change nothing.

    Raises:
        WorkdirError: some are not, or have other overrides.
    """
    path = folder / RECORD
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    now = json.loads(_record(members))
    lost = [
        name
        for name, overrides in before.items()
        if now.get(name) != overrides and (folder / name / CONFIG).exists()
    ]
    if lost:
        raise WorkdirError(
            f"{folder} has members that the sweep does not have any more: {', '.join(lost)}."
            " Give it these values back, choose another folder, or move these folders away."
            " Nothing was changed."
        )


def write_record(folder: Path, members: Sequence[Member]) -> None:
    """Write down which members a folder has."""
    files.write(epath.Path(folder) / RECORD, _record(members))


def _record(members: Sequence[Member]) -> str:
    return json.dumps({one.name: dict(one.overrides) for one in members}, indent=1) + "\n"


def _has_line(path: Path, step: int) -> bool:
    """Whether metrics.jsonl ends with the line of a step."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    try:
        return bool(lines) and json.loads(lines[-1])["step"] == step
    except (ValueError, KeyError):
        return False


@contextlib.contextmanager
def locked(folder: Path, *, wait: Callable[[], None]) -> Iterator[int]:
    """Hold a folder against other sweeps; yields a descriptor that members have to keep open.

    Args:
        folder: of the sweep; it exists.
        wait: called several times a second while members of a sweep that was killed still save; may
            raise.

    Raises:
        LockedError: another sweep is at work there.
    """
    with open(folder / LOCK, "a+") as own, open(folder / MEMBERS_LOCK, "a") as shared:
        if not _taken(own.fileno()):
            own.seek(0)
            raise LockedError(
                f"another run.sweep is at work in {folder}: {own.read().strip() or 'unknown'}."
                " Wait for it, stop it, or choose another folder"
            )
        own.truncate(0)
        own.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        own.flush()
        while not _taken(shared.fileno()):
            wait()
            time.sleep(WAIT_SECONDS)
        yield shared.fileno()


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
