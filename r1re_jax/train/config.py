"""From a ConfigDict to typed settings and back, and which keys may change when a run goes on."""

import dataclasses
import difflib
import enum
import hashlib
import json
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from r1re_jax.train.fields import FLAT
from r1re_jax.train.settings import Settings

# Keys (and all below them) that a run may go on with another value of, and why.
SAFE_KEYS: dict[str, str] = {
    "sft.steps": "a run can be extended",
    "grpo.steps": "a run can be extended",
    "evaluate": "only what is measured",
    "data.eval": "only what is measured",
    "checkpoint": "only what is saved",
    "log": "only what is written down",
    "mesh": "same sums, other devices",
    "model.attention": "same sums, other programs",
    "model.remat": "same sums, other memory",
    "model.parity_tokens": "only what is checked",
    "sft.micro_batch": "same sums, other memory",
    "grpo.micro_batch": "same sums, other memory",
    "grpo.micro_group": "same sums, other memory",
    "grpo.chunk": "same tokens, other memory",
    "grpo.compaction": "same tokens, other time",
    "grpo.smallest_batch": "same tokens, other time",
    "grpo.smallest_cache": "same tokens, other memory",
    "grpo.score_chunk": "same sums, other memory",
    "grpo.max_logp_gap": "only when to stop",
}


class SettingsError(ValueError):
    """A configuration that cannot be run; the message names every key at fault."""


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Turn a ConfigDict (or nested dict) into settings; every key is consumed or refused.

    Raises:
        SettingsError: unknown keys (with the nearest match), missing keys, values of a wrong type,
            and what the settings themselves refuse, all in one message.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    problems: list[str] = []
    settings = _section(Settings, values, "", problems)
    if problems:
        lines = "\n  ".join(problems)
        raise SettingsError(f"{len(problems)} problem(s) in the config:\n  {lines}")
    return settings


def resolved(settings: Settings) -> dict[str, Any]:
    """Return the settings as nested plain values, of the form that `read_settings` takes."""
    return _plain(settings)


def optional_sections(section: type = Settings, prefix: str = "") -> list[str]:
    """Return dotted names of the sections that a config may leave out, outer ones first."""
    found = []
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default) and FLAT not in field.metadata:
            name = prefix + field.name
            found += [name, *optional_sections(type(field.default), f"{name}.")]
    return found


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts in order; an empty dict counts as a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def origins(
    settings: Settings, config: Mapping[str, Any], *, by_flag: Collection[str] = ()
) -> dict[str, tuple[Any, str]]:
    """Return dotted key -> (value, where it is from): `flag`, `recipe` or `default`.

    Args:
        settings: as `read_settings` made them of `config`.
        config: what was given: of a recipe, with flags applied.
        by_flag: dotted keys that a flag set; of a section, all keys below.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    given = {key for key, _ in flat_keys(values)}
    # An empty section gives nothing that lies below it.
    sections = {key for key, value in flat_keys(values) if value != {}}

    def origin(key: str) -> str:
        above = {key[:end] for end, letter in enumerate(key) if letter == "."}
        if (above | {key}) & set(by_flag):
            return "flag"
        return "recipe" if key in given or above & sections else "default"

    return {key: (value, origin(key)) for key, value in flat_keys(resolved(settings))}


def is_safe(key: str) -> bool:
    """Whether a run may go on with another value of the dotted key."""
    return any(key == safe or key.startswith(safe + ".") for safe in SAFE_KEYS)


def configuration_hash(settings: Settings) -> str:
    """Return 16 hex digits of the SHA-256 of all keys that are not safe."""
    kept = {key: value for key, value in flat_keys(resolved(settings)) if not is_safe(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (old, new) of two resolved configurations, safe keys included."""
    before, after = dict(flat_keys(old)), dict(flat_keys(new))
    keys = sorted(before.keys() | after.keys())
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        out = {}
        for field in dataclasses.fields(value):
            inner = _plain(getattr(value, field.name))
            out |= inner if FLAT in field.metadata else {field.name: inner}
        return out
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def _keys(section: type) -> dict[str, dataclasses.Field]:
    """Config keys of a section, those of its flat fields included."""
    found = {}
    for field in dataclasses.fields(section):
        if FLAT in field.metadata:
            found |= _keys(typing.get_type_hints(section)[field.name])
        else:
            found[field.name] = field
    return found


def _section(section: type, values: Any, where: str, problems: list[str]) -> Any:
    """Build a dataclass from the values of its section, or note why not and return None."""
    if not isinstance(values, Mapping):
        problems.append(f"{where.rstrip('.')} is {values!r}; expected a section with keys")
        return None
    known = _keys(section)
    problems += [_unknown(where, key, known) for key in values if key not in known]
    return _build(section, values, where, problems)


def _build(section: type, values: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(section)
    before, given = len(problems), {}
    for field in dataclasses.fields(section):
        key = where + field.name
        if FLAT in field.metadata:
            # The section's own defaults, not those of the inner class: a phase may differ.
            inner = dataclasses.asdict(field.default) | {k: v for k, v in values.items()}
            kept = {k: inner[k] for k in _keys(hints[field.name])}
            given[field.name] = _build(hints[field.name], kept, where, problems)
        elif field.name in values:
            given[field.name] = _value(hints[field.name], values[field.name], key, problems)
        elif _required(field):
            problems.append(f"{key} is missing; expected {_described(hints[field.name])}")
    if len(problems) > before:
        return None
    try:
        return section(**given)
    except ValueError as error:
        problems.append(f"{where.rstrip('.')}: {error}" if where else str(error))
        return None


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Convert one value to its annotated type, or note why not and return None."""
    if type(None) in typing.get_args(hint):
        if value is None:
            return None
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, key + ".", problems)
    if typing.get_origin(hint) is Mapping or isinstance(hint, type) and issubclass(hint, Mapping):
        return _mapping(typing.get_args(hint)[1], value, key, problems)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        choices = [member.value for member in hint]
        if value in choices:
            return hint(value)
        near = difflib.get_close_matches(str(value), choices, n=1)
        problems.append(
            f"{key} is {value!r}; expected one of {', '.join(choices)}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    problems.append(f"{key} is {value!r}, a {type(value).__name__}; expected {_described(hint)}")
    return None


def _mapping(hint: Any, values: Any, key: str, problems: list[str]) -> dict[str, Any] | None:
    if not isinstance(values, Mapping):
        problems.append(f"{key} is {values!r}; expected a section with keys")
        return None
    return {name: _value(hint, value, f"{key}.{name}", problems) for name, value in values.items()}


def _described(hint: Any) -> str:
    """Say what a value of this type looks like in a config."""
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is Mapping:
        return "a section"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(member.value for member in hint)
    return {int: "an integer", float: "a number", str: "a string", bool: "True or False"}[hint]


def _unknown(where: str, key: str, known: Mapping[str, Any]) -> str:
    """Say that nothing reads a key, and which one was probably meant."""
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"unknown key {where}{key}; did you mean {where}{near[0]}?"
    everywhere = [name for name in _all_keys(Settings) if name.rsplit(".", 1)[-1] == key]
    everywhere += difflib.get_close_matches(where + key, _all_keys(Settings), n=1, cutoff=0.7)
    hint = f"did you mean {everywhere[0]}?" if everywhere else f"there are {', '.join(known)}"
    return f"unknown key {where}{key}; {hint}"


def _all_keys(section: type, prefix: str = "") -> list[str]:
    """Every dotted key of the fixed part of a config."""
    found = []
    for name, field in _keys(section).items():
        if dataclasses.is_dataclass(field.type):
            found += _all_keys(field.type, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
