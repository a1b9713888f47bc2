"""Write miniworld to files, or make the untrained policy that its base policy grows from.

python -m run.miniworld --fresh=DIR     tokenizer and random weights, a Hugging Face folder
python -m run.miniworld --data=DIR      held-out sets, JSON lines and guides, as run.evaluate reads
"""

from absl import app, flags

from r1re_jax.files import place, write
from r1re_jax.launch.fresh import fresh_policy
from r1re_jax.task import miniworld
from r1re_jax.task.readers import write_jsonl

FRESH = flags.DEFINE_string("fresh", None, "folder for an untrained policy")
DATA = flags.DEFINE_string("data", None, "folder for the held-out sets")
COUNT = flags.DEFINE_integer("count", 400, "examples of each held-out set", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "another seed gives other weights and sentences")


def main(argv: list[str]) -> None:
    """Write what the flags ask for."""
    if len(argv) > 1 or not (FRESH.value or DATA.value):
        raise app.UsageError("give --fresh=DIR or --data=DIR")
    if FRESH.value:
        policy = fresh_policy(FRESH.value, seed=SEED.value)
        print(f"{FRESH.value}: {policy.model.config}")
    for domain in ("general", "medical") if DATA.value else ():
        folder = place(DATA.value)
        guide, examples = miniworld.examples(domain=domain, count=COUNT.value, seed=SEED.value)
        write(folder / f"{domain}.md", guide.text)
        write_jsonl(folder / f"{domain}.jsonl", examples)
        print(f"{folder / domain}.jsonl: {len(examples)} examples, with {domain}.md")


if __name__ == "__main__":
    app.run(main)
