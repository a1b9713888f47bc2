"""Show what a config comes to: every key with its value, and the parameters on their devices.

python -m run.show --config=configs/F.py [--config.key=value ...]

Nothing is trained and no weights are read: of a model folder only config.json is.
"""

import json
import sys

from absl import app, logging

from r1re_jax.train.config import configuration_hash, read_settings, resolved
from r1re_jax.train.start import abstract_model, run_mesh
from r1re_jax.train.state import model_layout, parameter_table
from run.recipe import define_config, parse

CONFIG = define_config()


def main(argv: list[str]) -> None:
    """Print the resolved config as JSON, then the table."""
    logging.set_verbosity(logging.WARNING)  # gcsfs tells of every read
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        settings = read_settings(CONFIG.value)
        layout = model_layout(abstract_model(settings), run_mesh(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"run.show: {error}")
    print(json.dumps(resolved(settings), indent=1, ensure_ascii=False))
    print(f"hash {configuration_hash(settings)}\n")
    print(parameter_table(layout))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
