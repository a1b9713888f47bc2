"""The work directory: whose it is, and what it holds beyond the checkpoint a run goes on from."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from r1re_jax import files, hosts
from r1re_jax.policy_source import saved_steps
from r1re_jax.train.config import (
    SettingsError,
    configuration_hash,
    differences,
    is_safe,
    read_settings,
    resolved,
)
from r1re_jax.train.settings import Settings

CONFIG = "config.json"
# What a run writes; a folder that holds any of it without a config.json is somebody else's.
PARTS = ("checkpoints", "completions", "eval", "metrics.jsonl", "policy", "reference")
LIBRARIES = ("flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "transformers")


class WorkdirError(ValueError):
    """A work directory that this run may not write to; nothing was changed."""


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    from r1re_jax import __version__

    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"r1re_jax": __version__, "python": platform.python_version(), **found}


def check_workdir(
    workdir: str | os.PathLike, settings: Settings, *, data: Mapping[str, str]
) -> dict[str, Any]:
    """Check that a directory is new or of this configuration; change nothing.

    Args:
        workdir: of the run.
        settings: of the run.
        data: name -> SHA-256 of every file that training reads.

    Returns:
        The config.json that it should have. Safe keys may have changed: it has the new values, and
        the old ones in `history`.

    Raises:
        WorkdirError: it holds a run of another configuration or of other data (the message names
            every key), or files that no run has a config.json for.
        PlaceError: a bucket that cannot be used.
    """
    workdir = files.place(workdir)
    files.check_bucket(workdir)
    content = {
        "config": resolved(settings),
        "hash": configuration_hash(settings),
        "versions": versions(),
        "data": dict(data),
        "history": [],
    }
    content = json.loads(json.dumps(content))  # as it will be read: tuples are lists
    if not (workdir / CONFIG).exists():
        strange = [name for name in PARTS if (workdir / name).exists()]
        if strange:
            raise WorkdirError(
                f"{workdir} has {', '.join(strange)} but no {CONFIG}: nobody knows of which run."
                " Choose another work directory or move these away. Nothing was changed."
            )
        return content
    before = read_config(workdir)
    changed = _check_same(workdir, before, content)
    content["history"] = before.get("history", [])
    if changed or before.get("versions") != content["versions"]:
        old = {"changed": changed, "versions": before.get("versions")}
        content["history"] = [*content["history"], old]
    return content


def open_workdir(
    workdir: str | os.PathLike, settings: Settings, *, data: Mapping[str, str]
) -> epath.Path:
    """Make the directory with its config.json, or bring that up to date; see `check_workdir`."""
    workdir = files.place(workdir)
    content = check_workdir(workdir, settings, data=data)
    if not (workdir / CONFIG).exists() or read_config(workdir) != content:
        write_json(workdir / CONFIG, content)
    return workdir


def newest_step(workdir: str | os.PathLike) -> int | None:
    """Return the step of the newest checkpoint, or None."""
    return max(saved_steps(files.place(workdir)), default=None)


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Read config.json of a work directory.

    Raises:
        WorkdirError: there is none, or it is no JSON object with a `config`.
    """
    path = files.place(workdir) / CONFIG
    try:
        content = json.loads(files.read_text(path))
    except FileNotFoundError:
        raise WorkdirError(
            f"{path} is missing; {workdir} is no work directory of run.train"
        ) from None
    except ValueError as error:
        raise WorkdirError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise WorkdirError(f"{path} holds no configuration; expected an object with `config`")
    return content


def forget_after(workdir: str | os.PathLike, step: int) -> list[str]:
    """Remove what a run wrote on steps after the one it goes on from; they are done again, alike.

    Returns:
        What was removed, relative to the work directory. metrics.jsonl is its writer's own.
    """
    workdir = files.place(workdir)
    texts = [p for p in files.children(workdir / "completions") if p.name.endswith(".jsonl")]
    evaluations = [path for path in files.children(workdir / "eval") if "-" in path.name]
    later = [path for path in (*texts, *evaluations) if (_step_of(path) or 0) > step]
    for path in later if hosts.is_first() else ():
        files.remove(path)
    return sorted(str(path.relative_to(workdir)) for path in later)


def write_json(path: epath.Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_lines(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines that are there whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: epath.Path, text: str) -> None:
    """Write a file that is there whole or not at all; its folder is made. One process writes."""
    if hosts.is_first():
        files.write(path, text)


def _check_same(
    workdir: epath.Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Refuse another configuration or other data; return the safe keys that changed."""
    changed = differences(_filled(before["config"]), now["config"])
    lines = [
        f"{key} is {old!r} there and {new!r} here"
        for key, (old, new) in changed.items()
        if not is_safe(key)
    ]
    old, new = changed.get("sft.steps", (0, 0))
    newest = newest_step(workdir) or 0
    if newest > min(old, new) and old != new:
        lines.append(
            f"sft.steps was {old} and is {new}, but the run is at step {newest}, where that decides"
            " what a step trains with"
        )
    data = differences(before.get("data", {}), now["data"])
    lines += [f"the content of {name} is not what it was" for name in data]
    if lines:
        hint = ""
        if any(key.endswith(".decay_steps") for key in changed):
            hint = " (a schedule's length is fixed: give decay_steps the value it has there)"
        listed = "\n  ".join(lines)
        raise WorkdirError(
            f"{workdir} is of another configuration:\n  {listed}\nChoose another work directory, or"
            f" give these their old values{hint}. Nothing was changed."
        )
    return changed


def _filled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with the defaults of keys that the version that wrote it had not.

    A new key's default is what was done without it, so that such a run can go on.
    """
    try:
        return json.loads(json.dumps(resolved(read_settings(config))))
    except SettingsError:
        return config  # of keys that are no more: they are shown as differences


def _step_of(path: epath.Path) -> int | None:
    number = path.name.removesuffix(".jsonl").split("-")[0]
    return int(number) if number.isdigit() else None
