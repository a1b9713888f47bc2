"""From what a config's `sweep()` returns to named members, each a run of its own.

    {"grpo.group": [8, 16], "seed": [0, 1]}                         the product: four members
    {("grpo.group", "grpo.questions"): [(8, 64), (16, 32)]}         a zip: two members
    [{"grpo.loss": ["grpo", "gspo"]}, {"grpo.dual_clip": 3.0}]      one after the other: three
    {"grpo.loss": "gspo", "grpo.clip_high": [0.2, 0.3]}             what is no list holds for all

A member's name says its overrides and nothing else, so that it stays what it is while others come
and go, and can be the name of a folder.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1re_jax.train.config import SettingsError, read_settings, resolved
from r1re_jax.train.settings import Settings

SEED = "seed"
# A member that overrides nothing.
PLAIN = "recipe"
# File systems take 255 bytes a name; this leaves room for what is beside a member.
LONGEST_NAME = 120
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_STRANGE = re.compile(r"[^A-Za-z0-9._+=,-]")


class SweepError(ValueError):
    """A sweep that cannot be run; the message names what is wrong in it."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        overrides: value by dotted key.
    """

    name: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All runs of a sweep.

    Attributes:
        axes: the keys that vary, those of a zip together, in the order in which they are given.
        members: in that order too, the last axis fastest.
    """

    axes: tuple[tuple[str, ...], ...]
    members: tuple[Member, ...]


def expand(given: Any) -> Sweep:
    """Return the members of what `sweep()` returned: a mapping, or a list of mappings.

    Raises:
        SweepError: another form, no values, keys that are no dotted keys, members of equal names.
    """
    blocks = [given] if isinstance(given, Mapping) else given
    if not isinstance(blocks, list | tuple) or not blocks:
        raise SweepError(
            f"sweep() returned {given!r}; expected a mapping of dotted keys to lists of values, or"
            " a list of such mappings"
        )
    axes: dict[tuple[str, ...], None] = {}
    members = []
    for block in blocks:
        if not isinstance(block, Mapping):
            raise SweepError(f"sweep() has {block!r} in its list; expected a mapping")
        columns = [_axis(key, values) for key, values in block.items()]
        keys = [key for names, _ in columns for key in names]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise SweepError(f"sweep() gives {', '.join(twice)} twice in one mapping")
        axes |= {names: None for names, _ in columns}
        for values in itertools.product(*(rows for _, rows in columns)):
            overrides = dict(zip(keys, itertools.chain(*values), strict=True))
            members.append(Member(name=member_name(overrides), overrides=overrides))
    _refuse_equal_names(members)
    return Sweep(
        axes=tuple(axis for axis in axes if _varies(axis, members)), members=tuple(members)
    )


def member_name(overrides: Mapping[str, Any]) -> str:
    """Return a name for a folder: the overrides in the order of their keys.

    What a file name should not hold is replaced and what is too long is cut; then a hash of the
    overrides follows.
    """
    if not overrides:
        return PLAIN
    whole = ",".join(f"{key}={_shown(overrides[key])}" for key in sorted(overrides))
    name = _STRANGE.sub("_", whole)
    if name == whole and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{digest(overrides)}"


def digest(overrides: Mapping[str, Any]) -> str:
    """Return eight hex digits that are those of these overrides alone."""
    text = json.dumps(overrides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flags_of(overrides: Mapping[str, Any]) -> list[str]:
    """Return the overrides as arguments of run.train."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def member_settings(
    members: Sequence[Member], read: Callable[[Member], Mapping[str, Any]]
) -> dict[str, Settings]:
    """Return the settings of every member by its name; all are checked before any is run.

    Args:
        members: of the sweep.
        read: the member's config as run.train reads it from the command line.

    Raises:
        SweepError: what the settings refuse, each problem once with the members that have it; a
            value that does not survive the command line; two members that are the same run.
    """
    settings: dict[str, Settings] = {}
    problems: dict[str, list[str]] = {}
    for member in members:
        try:
            settings[member.name] = _settings(member, read(member))
        except ValueError as error:
            problems.setdefault(str(error), []).append(member.name)
    if problems:
        lines = (f"{_several(names)}: {message}" for message, names in problems.items())
        raise SweepError("\n".join(lines))
    _refuse_equal_runs(settings)
    return settings


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with overrides set; sections that are missing are made."""
    nested = {
        key: with_overrides(value, {}) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    for key, value in overrides.items():
        *path, last = key.split(".")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise SettingsError(f"{key}: {name} is a value and no section")
        section[last] = value
    return nested


def _settings(member: Member, config: Mapping[str, Any]) -> Settings:
    for key, value in member.overrides.items():
        found: Any = config
        for name in key.split("."):
            found = found[name]
        if _plain(found) != _plain(value) or isinstance(found, bool) is not isinstance(value, bool):
            raise SweepError(
                f"{key}={value!r} comes to {found!r} on the command line of run.train; give the"
                " recipe a value of the same type there"
            )
    return read_settings(config)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _axis(key: Any, values: Any) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return the keys of an item and their rows of values."""
    names = (key,) if isinstance(key, str) else key
    if not isinstance(names, tuple) or not names:
        raise SweepError(f"sweep() has the key {key!r}; expected a dotted key or a tuple of some")
    for name in names:
        if not isinstance(name, str) or not _KEY.fullmatch(name):
            raise SweepError(f"sweep() has the key {name!r}; expected one such as 'grpo.group'")
    if isinstance(values, list) and not values:
        raise SweepError(f"sweep() gives {', '.join(names)} an empty list")
    if isinstance(key, str):
        return names, [(value,) for value in (values if isinstance(values, list) else [values])]
    rows = values if isinstance(values, list) else [values]
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != len(names):
            raise SweepError(
                f"sweep() zips {', '.join(names)} and has {row!r}; expected {len(names)} values"
            )
    return names, [tuple(row) for row in rows]


def _varies(axis: tuple[str, ...], members: Sequence[Member]) -> bool:
    """Whether not all members have the same values of some keys."""
    return len({repr([member.overrides.get(key) for key in axis]) for member in members}) > 1


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(_shown, value))
    return value if isinstance(value, str) else repr(value)


def _refuse_equal_names(members: Iterable[Member]) -> None:
    seen: set[str] = set()
    for member in members:
        # Some file systems do not tell case apart.
        if member.name.casefold() in seen:
            raise SweepError(f"sweep() yields {member.name} twice")
        seen.add(member.name.casefold())


def _refuse_equal_runs(settings: Mapping[str, Settings]) -> None:
    seen: dict[str, str] = {}
    for name, one in settings.items():
        text = json.dumps(resolved(one), sort_keys=True)
        if text in seen:
            raise SweepError(f"{seen[text]} and {name} are the same run: their settings are equal")
        seen[text] = name


def _several(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
