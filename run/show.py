"""Show what a config comes to: every key, its value and where that is from; then the parameters.

python -m run.show --config=configs/F.py[:ARGUMENT] [--config.key=value ...] [--json=FILE]

Of each parameter shape, axes, sharding and bytes. Nothing is trained and no weights are read: of a
model folder only config.json is.
"""

import pathlib
import sys
from collections.abc import Mapping

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1re_jax.train.config import configuration_hash, origins, read_settings, resolved
from r1re_jax.train.start import run_layout, run_mesh
from r1re_jax.train.state import parameter_table
from r1re_jax.train.workdir import write_json
from run.recipe import define_config, parse

CONFIG = define_config()
JSON = flags.DEFINE_string("json", None, "file to write config, origins and hash to")


def main(argv: list[str]) -> None:
    """Print the keys, the hash and the parameters."""
    logging.set_verbosity(logging.WARNING)  # gcsfs tells of every read
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        settings = read_settings(CONFIG.value)
        layout = run_layout(settings, run_mesh(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"run.show: {error}")
    by_flag = config_flags.get_override_values(flags.FLAGS["config"])
    found = origins(settings, CONFIG.value, by_flag=by_flag)
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False).print(_keys(found))
    print(f"hash {configuration_hash(settings)}\n")
    print(parameter_table(layout))
    if JSON.value:
        content = {"config": resolved(settings), "hash": configuration_hash(settings)}
        content["origins"] = {key: origin for key, (_, origin) in found.items()}
        write_json(pathlib.Path(JSON.value), content)


def _keys(found: Mapping[str, tuple[object, str]]) -> Table:
    """A row a key; what is not a default stands out."""
    table = Table("key", "value", "from", box=None, pad_edge=False)
    for key, (value, origin) in found.items():
        style = "dim" if origin == "default" else "bold" if origin == "flag" else ""
        table.add_row(Text(key, style), Text(repr(value), style), Text(origin, style))
    return table


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
