"""Check a run before it costs money; exit status 1 if anything is wrong.

python -m run.doctor --config=configs/F.py [--workdir=W] [--json=FILE] [--config.key=value ...]

Reads config, data and policy as run.train does, on the devices that are here, and compares sampler
and trainer on a few tokens. Nothing is trained, and nothing is written but FILE.
"""

import sys

from absl import app, flags, logging
from rich.console import Console

from r1re_jax.files import place
from r1re_jax.launch.doctor import examine, report, table
from r1re_jax.report.trackers import check_trackers
from r1re_jax.train.workdir import write_json
from run.programs import keep_programs
from run.recipe import define_config, parse

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder that the run will be in, to be checked too")
JSON = flags.DEFINE_string("json", None, "file to write the results to")


def main(argv: list[str]) -> None:
    """Print a line as each check ends, then all that was found."""
    keep_programs()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    results = []
    for result in examine(CONFIG.value, WORKDIR.value, trackers=check_trackers):
        print(f"{result.name}: {result.status}", file=sys.stderr)
        results.append(result)
    Console(width=None if sys.stdout.isatty() else 120).print(table(results))
    found = report(results)
    if JSON.value:
        write_json(place(JSON.value), found)
    if not found["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
