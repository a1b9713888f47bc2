"""What a sweep's config file says: its overrides, and the config of each member."""

import importlib.util
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from r1re_jax.launch.sweep import SweepError, flags_of, with_overrides
from r1re_jax.train.config import read_settings
from run.recipe import define_config, reason


def read_recipe(path: str, given: Sequence[str], overrides: Mapping[str, Any]) -> ConfigDict:
    """Return the config that run.train reads from such a command line.

    Args:
        path: FILE[:arg].
        given: further arguments, each --config.key=value.
        overrides: by dotted key; they stand behind the others.

    Raises:
        ValueError: an override that nothing reads (with the nearest match), that has no section in
            the recipe, or that has another type than the value there.
    """
    try:
        return _read([f"--config={path}", *given, *flags_of(overrides)])
    except KeyError as error:
        base = _read([f"--config={path}", *given])
        read_settings(with_overrides(base.to_dict(), overrides))  # says which key was meant
        raise SweepError(
            f"the recipe has no section for one of the keys: {error.args[0]}; give it one in"
            " get_config(), where a flag can set what is in it"
        ) from None
    except flags.Error as error:
        raise SweepError(reason(error)) from None


def read_sweep(path: str) -> Any:
    """Return what `sweep()` of FILE[:arg] gives; it gets the argument if it takes one.

    Raises:
        SweepError: no such file, or it has no sweep().
    """
    file, colon, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise SweepError(f"no config file at {file}")
    spec = importlib.util.spec_from_file_location("sweep_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise SweepError(
            f"{file} has no sweep(); expected one that returns overrides beside get_config()"
        )
    takes = inspect.signature(module.sweep).parameters
    return module.sweep(argument) if colon and takes else module.sweep()


def _read(arguments: Sequence[str]) -> ConfigDict:
    """Parse arguments as if they were the process's own."""
    values = flags.FlagValues()
    argv = ["run.train", *arguments]
    flag = define_config(values, argv)
    values(argv)
    return flag.value
