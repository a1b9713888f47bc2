"""Make a domain of your own: a guide to fill in, and data, from sentences and a list of labels.

python -m run.prepare --sentences=F.csv --labels=F.txt --out=DIR

F.csv has the columns text, with <e1>…</e1> and <e2>…</e2> marked in the order of the text, and
label; F.txt a label a line, or "Label: definition". DIR gets guide.md, train.jsonl and test.jsonl.
Places of the guide that say TODO are yours. Nothing is overwritten.
"""

import pathlib
import sys

from absl import app, flags

from r1re_jax.task.own_data import Domain, prepare
from r1re_jax.task.readers import write_jsonl
from r1re_jax.task.schema import DataError, GuideError

SENTENCES = flags.DEFINE_string("sentences", None, "CSV, or TSV by its name", required=True)
LABELS = flags.DEFINE_string("labels", None, "text file, a label a line", required=True)
OUT = flags.DEFINE_string("out", None, "folder to write to", required=True)
TITLE = flags.DEFINE_string("title", None, "of the guide; else the folder's name")
TEST = flags.DEFINE_float("test", 0.4, "share of each label's sentences that is held out")
SEED = flags.DEFINE_integer("seed", 0, "of which sentences are held out")


def main(argv: list[str]) -> None:
    """Write the three files and print what is in them."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    out = pathlib.Path(OUT.value)
    paths = [out / name for name in ("guide.md", "train.jsonl", "test.jsonl")]
    there = [str(path) for path in paths if path.exists()]
    if there:
        sys.exit(f"run.prepare: {', '.join(there)} is there already; nothing was written")
    try:
        domain = prepare(
            SENTENCES.value,
            LABELS.value,
            title=TITLE.value or out.name,
            held_out=TEST.value,
            seed=SEED.value,
        )
    except (DataError, GuideError) as error:
        sys.exit(f"run.prepare: {error}")
    out.mkdir(parents=True, exist_ok=True)
    guide, train, test = paths
    guide.write_text(domain.guide.text, encoding="utf-8")
    write_jsonl(train, domain.train)
    write_jsonl(test, domain.test)
    print(_told(domain, paths))


def _told(domain: Domain, paths: list[pathlib.Path]) -> str:
    counts = domain.counts()
    width = max(map(len, counts))
    rows = [f"  {label:<{width}}  {train:5}  {test:5}" for label, (train, test) in counts.items()]
    head = f"  {'label':<{width}}  train   test"
    todo = f"{paths[0]} has {domain.unsaid} places to fill in, marked TODO" if domain.unsaid else ""
    return "\n".join([head, *rows, "wrote " + ", ".join(map(str, paths)), *filter(None, [todo])])


if __name__ == "__main__":
    app.run(main)
