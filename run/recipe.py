"""The --config flag of the entry points that take a recipe."""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from r1re_jax.train.config import optional_sections


class _Whole(flags.ArgumentParser):
    """Reads a recipe and gives it the sections that it leaves out, for flags to set keys of."""

    def __init__(self, recipe: flags.ArgumentParser):
        self._recipe = recipe

    def parse(self, argument: str) -> ConfigDict:
        """Return the recipe of a file, every section there."""
        config = self._recipe.parse(argument)
        # Others stay as they are: a frozen one, or what stands in for a file that failed.
        if type(config) is ConfigDict:
            with config.unlocked():
                for name in optional_sections():
                    _fill(config, name.split("."))
        return config

    def flag_type(self) -> str:
        """Return what the flag's value is called."""
        return self._recipe.flag_type()


def _fill(section: ConfigDict, names: Sequence[str]) -> None:
    """Give a section the one of a name below it; what is no section is left to `read_settings`."""
    for name in names:
        if name not in section:
            section[name] = ConfigDict()
        section = section[name]
        if not isinstance(section, ConfigDict):
            return


def define_config(
    values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
    """Define --config=FILE[:arg] and --config.key=value; the flag must be given.

    Keys that the recipe leaves out can be set too, and sections that need not be there
    (`optional_sections`). What no setting reads is refused
    by `r1re_jax.train.config.read_settings`, with the nearest match.

    Args:
        values: where the flag is defined.
        argv: the command line that they will parse, if it is not the process's own.
    """
    flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE[:arg] with get_config(arg)",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=argv,
    )
    values["config"].parser = _Whole(values["config"].parser)
    flags.mark_flags_as_required(["config"], values)
    return flag


def parse(argv: Sequence[str]) -> list[str]:
    """Parse flags, for `app.run`; say what is wrong in a line, not how that came out."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(f"{reason(error)}\nPass --help for help on flags.")
    except KeyError as error:
        sys.exit(f"--config: the recipe has no section for one of the keys: {error.args[0]}")


def reason(error: flags.Error) -> str:
    """Return why flags were refused: of a recipe that fails absl's message is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ValueError: ")
