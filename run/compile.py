"""Compile the programs of a run's GRPO before it begins; exit status 1 if they do not fit.

python -m run.compile --config=configs/F.py [--topology=v5e:4x4] [--json=FILE]

For the devices that are here, or for a TPU slice that need not be (docs/tpu.md says how). Reads no
weights, data or tokenizer. Prints a line for each program: memory of a device, operations,
collectives, and for a slice the predicted time (`r1re_jax.launch.program` says how).
"""

import json
import sys

import jax
from absl import app, flags, logging

from r1re_jax.files import place
from r1re_jax.launch.compile import compile_run, predicted_step
from r1re_jax.launch.needs import advice, refused, shown, summary
from r1re_jax.launch.topology import tpu_slice
from r1re_jax.train.config import read_settings
from r1re_jax.train.start import run_mesh
from r1re_jax.train.workdir import write_json
from run.recipe import define_config, parse

CONFIG = define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, such as v5e:4x4")
JSON = flags.DEFINE_string("json", None, "file to write the result to")


def main(argv: list[str]) -> None:
    """Compile one program after the other."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    try:
        where = None if TOPOLOGY.value is None else tpu_slice(TOPOLOGY.value)
        settings = read_settings(CONFIG.value)
        mesh = run_mesh(settings, devices=None if where is None else where.devices)
    except ValueError as error:
        sys.exit(f"run.compile: {error}")
    reports, problem = [], None
    try:
        rates = None if where is None else where.rates
        for report in compile_run(settings, mesh, rates=rates):
            print(shown(report), flush=True)
            reports.append(report)
    except ValueError as error:
        sys.exit(f"run.compile: {error}")
    except jax.errors.JaxRuntimeError as error:
        problem = refused(error)
        if problem is None:
            raise
    result = summary(reports, where, devices=mesh.size, refused=problem)
    step = predicted_step(settings, reports)
    if step is not None:
        result["predicted_step"] = step
    if JSON.value:
        write_json(place(JSON.value), result)
    print(json.dumps({name: value for name, value in result.items() if name != "programs"}))
    if result["fits"] is False:
        sys.exit(f"run.compile: {advice(result, where)}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
