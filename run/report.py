"""Write the HTML report of a run, and its curves as PNG, from its work directory.

python -m run.report --workdir=W
"""

import sys

from absl import app, flags, logging

from r1re_jax.files import PlaceError
from r1re_jax.report.html import write_report

WORKDIR = flags.DEFINE_string("workdir", None, "work directory of run.train", required=True)


def main(argv: list[str]) -> None:
    """Write W/report.html and W/curves/*.png and print the page's path."""
    logging.set_verbosity(logging.WARNING)  # gcsfs tells of every read
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; the folder goes into --workdir")
    try:
        print(write_report(WORKDIR.value))
    except (FileNotFoundError, PlaceError) as error:
        sys.exit(f"run.report: {error}")


if __name__ == "__main__":
    app.run(main)
