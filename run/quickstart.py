"""Run the main job on the embedded default: SFT, GRPO, evaluation, export, report.

python -m run.quickstart [--smoke]

R1RE_SEED sets the training seed, R1RE_OUT the folder (runs/quickstart). The last line is JSON. A
second call goes on where the first was interrupted. --smoke takes a few steps of each phase: it
shows that everything works here, and not how well it learns.
"""

import argparse
import contextlib
import json
import os
import sys
import time

from rich.console import Console

from configs import miniworld
from r1re_jax.files import place
from r1re_jax.report import quickstart
from r1re_jax.report.history import read_history
from run.train import train


def main() -> None:
    """Train both policies and show what came out."""
    # Not absl's flags: those of run.train, which ask for a config, would be read too.
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps of each phase")
    smoke = parser.parse_args().smoke
    start = float(os.environ.get("R1RE_START", time.time()))
    seed = int(os.environ.get("R1RE_SEED", "0"))
    out = place(os.environ.get("R1RE_OUT", "runs/quickstart")) / f"seed-{seed}"
    finished = {}
    for variant in ("", "sft_only"):
        config = miniworld.get_config(f"{variant},smoke" if smoke else variant)
        config.seed = seed
        again = "bash run/quickstart.sh, with the same R1RE_SEED and R1RE_OUT"
        finished[variant] = train(config, out / (variant or "grpo"), again=again)
    workdir = out / "grpo"
    products = quickstart.finish(workdir, export=out / "export")
    history = read_history(workdir)
    console = Console(width=None if sys.stdout.isatty() else 120)
    quickstart.show(history, read_history(out / "sft_only"), console)
    for path in (products.report, *products.curves, products.export):
        console.print(path, soft_wrap=True, highlight=False)
    steps = quickstart.stage_steps(finished[""])
    seconds = time.time() - start
    print(json.dumps(quickstart.result(history, steps=steps, products=products, seconds=seconds)))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
