"""Evaluate a policy on a file of examples under an annotation guide.

python -m run.evaluate --model=M --data=test.jsonl --guide=guide.md --out=O --samples=4

Writes O/predictions.jsonl as it goes and O/metrics.json at the end; the same command goes on where
it was interrupted. One sample (the default) is greedy; --samples=4 gives Avg@4 and Pass@4.
--task=triplets asks for all entities and triplets of sentences without marks.
"""

import contextlib
import dataclasses
import sys

from absl import app, flags, logging
from rich.console import Console

from r1re_jax.evaluate import evaluate
from r1re_jax.policy_files import load_policy
from r1re_jax.report.progress import open_progress
from r1re_jax.report.summary import print_metrics
from r1re_jax.task.readers import data_sha256, resolve_data
from r1re_jax.task.relations import load_guide
from r1re_jax.task.tasks import TaskKind, make_task
from run.programs import keep_programs

MODEL = flags.DEFINE_string("model", None, "model folder or work directory", required=True)
DATA = flags.DEFINE_string("data", None, "examples, .jsonl or .jsonl.gz", required=True)
GUIDE = flags.DEFINE_string("guide", None, "annotation guide, Markdown", required=True)
OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
TASK = flags.DEFINE_enum_class("task", TaskKind.RELATION, TaskKind, "what to ask under the guide")
LIMIT = flags.DEFINE_integer("limit", 0, "only the first examples; 0 takes all", lower_bound=0)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "what to compute in")
# Arguments of r1re_jax.evaluate.evaluate.
HOW = (
    flags.DEFINE_integer("samples", 1, "k, completions of each example", lower_bound=1),
    flags.DEFINE_float("temperature", None, "default: 0 for one sample, 1 for more", lower_bound=0),
    flags.DEFINE_bool("greedy", False, "beside: one completion at temperature 0, into OUT/greedy"),
    flags.DEFINE_integer("seed", 0, "seed of the sampling", lower_bound=0),
    flags.DEFINE_integer("batch", 32, "examples at a time", lower_bound=1),
    flags.DEFINE_string("name", "evaluate", "of the set; part of the sampling's randomness"),
    flags.DEFINE_string("protocol", "", "which split and rules the figures are of, for the record"),
)
LIMITS = [
    flags.DEFINE_integer(f"limits.{level}", None, f"most tokens of a {level}; default: the model's")
    for level in ("guide", "question", "completion")
]


def main(argv: list[str]) -> None:
    """Read the data before the model is loaded, so that bad input costs nothing."""
    keep_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every read in a dozen lines
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        task = make_task(TASK.value)
        guide = load_guide(resolve_data(GUIDE.value))
        examples = task.read(DATA.value, task.schema(guide))[: LIMIT.value or None]
        how = {flag.name: flag.value for flag in HOW} | {"data_sha256": data_sha256(DATA.value)}
        policy = load_policy(MODEL.value, dtype=DTYPE.value).for_kind(task.kind)
        limits = {flag.name.split(".")[1]: flag.value for flag in LIMITS if flag.value is not None}
        how["limits"] = dataclasses.replace(policy.limits, **limits)
        with contextlib.closing(open_progress(sys.stderr)) as progress:
            progress.phase("evaluate", total=len(examples))
            how["on_batch"] = lambda done, total: progress.write(done, {})
            how["on_chunk"] = lambda chunk: progress.tick(f"token {chunk.tokens}/{chunk.limit}")
            how |= {"out": OUT.value, "model": policy.provenance or MODEL.value}
            metrics = evaluate(policy, examples, guide, **how)
    except (ValueError, OSError) as error:
        sys.exit(f"run.evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit(f"run.evaluate: interrupted; the same command goes on in {OUT.value}")
    print_metrics(metrics, Console())


if __name__ == "__main__":
    app.run(main)
