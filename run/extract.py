"""Extract the relation between two marked mentions, one JSON object a line.

python -m run.extract --model=M --guide=guide.md "The <e1>storm</e1> broke the <e2>mast</e2>."
python -m run.extract --model=M --guide=guide.md - < tagged_lines.txt
python -m run.extract --model=M --guide=guide.md --task=triplets "The storm broke the mast."

Prints {"label", "reasoning", "text", "problem"}; text is what the policy wrote. Where it gives no
label of the guide, label is null and problem says why. With --task=triplets all entities and
triplets of a plain text: {"entities", "triplets", "reasoning", "text", "problem"}.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags, logging

from r1re_jax.annotate import extract
from r1re_jax.policy_files import load_policy
from r1re_jax.task.readers import resolve_data
from r1re_jax.task.relations import DataError, load_guide
from r1re_jax.task.tasks import AnyExample, Task, TaskKind, make_task
from run.programs import keep_programs

MODEL = flags.DEFINE_string("model", None, "model folder or work directory", required=True)
GUIDE = flags.DEFINE_string("guide", None, "annotation guide, Markdown", required=True)
TASK = flags.DEFINE_enum_class("task", TaskKind.RELATION, TaskKind, "what to ask under the guide")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "seed of the sampling", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 8, "texts at a time", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "what to compute in")
LIMITS = [
    flags.DEFINE_integer(f"limits.{level}", None, f"most tokens of a {level}; default: the model's")
    for level in ("guide", "question", "completion")
]
flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind the text


def asked(texts: Sequence[str], task: Task) -> Iterator[AnyExample]:
    """Yield the texts as examples, for "-" those of standard input; DataError names a bad one."""
    piped = list(texts) == ["-"]
    for number, text in enumerate(sys.stdin if piped else texts, start=1):
        try:
            yield task.asked(text.rstrip("\r\n"), id=str(number))
        except DataError as error:
            raise DataError(f"{'standard input' if piped else 'text'}:{number}: {error}") from None


def main(argv: list[str]) -> None:
    """Read every text before the model is loaded, so that bad input costs nothing."""
    keep_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every read in a dozen lines
    if len(argv) < 2:
        raise app.UsageError('give a text with <e1>…</e1> and <e2>…</e2>, or "-" to read lines')
    try:
        task = make_task(TASK.value)
        guide = load_guide(resolve_data(GUIDE.value))
        task.schema(guide)
        examples = list(asked(argv[1:], task))
        policy = load_policy(MODEL.value, dtype=DTYPE.value).for_kind(task.kind)
        limits = {flag.name.split(".")[1]: flag.value for flag in LIMITS if flag.value is not None}
        how = {"temperature": TEMPERATURE.value, "seed": SEED.value, "batch": BATCH.value}
        how["limits"] = dataclasses.replace(policy.limits, **limits)
        for row in extract(policy, examples, guide, **how):
            print(json.dumps(row, ensure_ascii=False), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"run.extract: {error}")


if __name__ == "__main__":
    app.run(main)
