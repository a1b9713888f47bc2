"""Export a run's policy as a Hugging Face folder that transformers loads, and push it if asked.

python -m run.export --workdir=W --out=H [--step=N] [--dtype=bfloat16] [--push=ORG/NAME]
python -m run.export --workdir=W --out=H --adapter

H gets weights, tokenizer, a model card and r1re.json (template, limits, stop tokens), so that
run.evaluate and run.extract build the same prompts from it. What LoRA trained is merged into the
weights; --adapter writes it alone, in the format of PEFT. Without --step: the best checkpoint,
where the run scored them, else the newest. Nothing is overwritten.
"""

import sys

from absl import app, flags, logging
from etils import epath

from r1re_jax.files import absolute, children, is_remote, place
from r1re_jax.launch.hub import check_push, push
from r1re_jax.policy_files import load_policy, save_adapter, save_policy
from r1re_jax.report.card import exported_step, model_card

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run, or another policy", required=True)
OUT = flags.DEFINE_string("out", None, "folder to write, absent or empty", required=True)
STEP = flags.DEFINE_integer("step", None, "of the checkpoint", lower_bound=0)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the weights")
SHARD = flags.DEFINE_float("max_shard_gb", 5.0, "most GB of weights in a file", lower_bound=1e-6)
ADAPTER = flags.DEFINE_bool("adapter", False, "write a LoRA run's adapter alone, for PEFT")
LICENSE = flags.DEFINE_string("license", "", "of the policy; without it, the base model's if known")
PUSH = flags.DEFINE_string("push", "", "ORG/NAME on the Hugging Face hub to upload the export to")
PRIVATE = flags.DEFINE_bool("private", False, "make the pushed repository private")
OVERWRITE = flags.DEFINE_bool("push_overwrite", False, "replace all that the repository holds")


def export(out: epath.Path) -> None:
    """Check, load, save and push."""
    rights = {"private": PRIVATE.value, "overwrite": OVERWRITE.value}
    if any(rights.values()) and not PUSH.value:
        raise ValueError("--private and --push_overwrite say how to --push; give --push=ORG/NAME")
    if PUSH.value and is_remote(out):
        raise ValueError(f"--push uploads a folder of this machine; --out={out} is in a bucket")
    if children(out) or out.is_file():
        raise ValueError(f"{out} exists and is not empty; nothing is overwritten, choose another")
    if ADAPTER.value:
        if PUSH.value:
            raise ValueError("--adapter writes no policy that could be pushed; leave --push out")
        save_adapter(WORKDIR.value, out, step=STEP.value, dtype=DTYPE.value)
        print(f"exported the adapter of {WORKDIR.value} to {absolute(out)}")
        return
    if PUSH.value:
        check_push(PUSH.value, **rights)
    step = exported_step(WORKDIR.value, STEP.value)
    policy = load_policy(WORKDIR.value, step=step)
    card = model_card(
        policy,
        WORKDIR.value,
        name=PUSH.value or absolute(out).name,
        step=step,
        dtype=DTYPE.value,
        licence=LICENSE.value,
    )
    shard = int(SHARD.value * 1e9)
    save_policy(policy, out, dtype=DTYPE.value, card=card, max_shard_bytes=shard)
    print(f"exported {policy.provenance} to {absolute(out)}")
    if PUSH.value:
        print(f"pushed to {push(out, PUSH.value, **rights)}")


def main(argv: list[str]) -> None:
    """Export as the flags say."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every read in a dozen lines
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        export(place(OUT.value))
    except (ValueError, OSError) as error:
        sys.exit(f"run.export: {error}")


if __name__ == "__main__":
    app.run(main)
