"""Export a run's policy as a Hugging Face folder that transformers loads.

python -m run.export --workdir=W --out=H [--step=N] [--dtype=bfloat16]

H gets weights, tokenizer and r1re.json (template, limits, stop tokens), so that run.evaluate and
run.extract build the same prompts from it. Without --step: the best checkpoint, where the run
scored them, else the newest. Nothing is overwritten.
"""

import pathlib
import sys

from absl import app, flags

from r1re_jax.policy import load_policy, save_policy

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
OUT = flags.DEFINE_string("out", None, "folder to write, absent or empty", required=True)
STEP = flags.DEFINE_integer("step", None, "of the checkpoint", lower_bound=0)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the weights")


def main(argv: list[str]) -> None:
    """Load and save."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    out = pathlib.Path(OUT.value)
    if out.is_dir() and any(out.iterdir()) or out.is_file():
        sys.exit(
            f"run.export: {out} exists and is not empty; nothing is overwritten, choose another"
        )
    try:
        policy = load_policy(WORKDIR.value, step=STEP.value)
        save_policy(policy, out, dtype=DTYPE.value)
    except (ValueError, OSError) as error:
        sys.exit(f"run.export: {error}")
    print(f"exported {policy.provenance} to {out.absolute()}")


if __name__ == "__main__":
    app.run(main)
