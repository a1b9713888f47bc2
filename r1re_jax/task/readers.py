"""Examples from files and back.

Nothing is dropped or repaired: what breaks the data contract is refused by file and line.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

from etils import epath

from r1re_jax.files import absolute, open_bytes, place
from r1re_jax.task.relations import (
    DataError,
    Example,
    Guide,
    Mention,
    Schema,
    parse_guide,
    parse_tagged,
)
from r1re_jax.task.rows import (
    collect,
    decode_object,
    kind_of,
    located,
    numbered_lines,
    value,
    write_rows,
)

DATA_VARIABLE = "R1RE_DATA"
HUB_SEMEVAL2010 = "SemEvalWorkshop/sem_eval_2010_task_8"
SEMEVAL2010_TRAIN = 8000
"""Official ids 1 to 8000 are the training set, 8001 to 10717 the test set."""

_OFFICIAL_SENTENCE = re.compile(r'(?P<id>\d+)\t"(?P<tagged>.*)"')


def packaged_guide(name: str) -> Guide:
    """A guide that ships with the package, such as "semeval2010_short"."""
    folder = resources.files("r1re_jax.task") / "guides"
    file = folder / f"{name}.md"
    if not file.is_file():
        known = sorted(
            entry.name.removesuffix(".md")
            for entry in folder.iterdir()
            if entry.name.endswith(".md")
        )
        raise DataError(f"no packaged guide {name!r}; there are: {', '.join(known)}")
    return parse_guide(file.read_text(encoding="utf-8"), source=f"guides/{name}.md")


def resolve_data(path: str | os.PathLike[str]) -> epath.Path:
    """Finds a data file: an absolute path, or relative to the working directory or $R1RE_DATA.

    Raises:
      DataError: no such file; lists the places.
      PlaceError: a bucket that cannot be reached.
    """
    path = place(path).expanduser()
    places = [absolute(path)]
    root = os.environ.get(DATA_VARIABLE)
    if root and not path.is_absolute():
        places.append(absolute(place(root).expanduser()) / path)
    for there in places:
        if there.is_file():
            return there
    looked = "".join(f"\n  {there}{' (a folder)' if there.is_dir() else ''}" for there in places)
    unset = (
        ""
        if root or path.is_absolute()
        else f"\nand {DATA_VARIABLE}, the folder to look in next, is not set"
    )
    raise DataError(f"no data file {str(path)!r}; looked at{looked}{unset}")


def data_sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a data file's bytes, as they are stored."""
    with open_bytes(resolve_data(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(
    path: str | os.PathLike[str], *, schema: Schema, dataset: str | None = None
) -> list[Example]:
    """Reads examples from JSON lines, `.jsonl` or `.jsonl.gz`.

    A line is an object with `id, text, head {text, start, end, type?}, tail {…}, label` and
    optionally `split, domain, labels, reasoning`; further keys are let be.

    Args:
      path: see `resolve_data`.
      schema: the labels of the guide; others are refused with the nearest one.
      dataset: if given, rows that name another `dataset` are refused.

    Raises:
      DataError: a file that is missing, empty or unreadable, or a line that breaks the contract
        (`file:line: …`).
    """

    def rows() -> Iterator[tuple[int, Example]]:
        for number, line in numbered_lines(resolve_data(path)):
            with located(path, number):
                example = _parse_row(line, schema=schema, dataset=dataset)
            yield number, example

    return collect(rows(), source=path)


def write_jsonl(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Writes examples so that `read_jsonl` gives them back; equal examples give equal bytes."""
    write_rows(path, map(_row, examples))


def read_semeval2010(path: str | os.PathLike[str]) -> list[Example]:
    """Reads the official text form of SemEval-2010 Task 8: sentence, label and comment lines.

    Files without labels (TEST_FILE_CLEAN.TXT) give examples with label "". Comments are for people
    and left out.

    Raises:
      DataError: a file or line that is not of that form (`file:line: …`).
    """
    schema = packaged_guide("semeval2010_short").schema
    return collect(_official_rows(path, schema), source=path)


def load_hub_semeval2010(split: str) -> list[Example]:
    """SemEval-2010 Task 8 from the Hugging Face hub, as `read_semeval2010` gives it.

    Raises:
      DataError: a split of another name, or a row that is not of the official form.
    """
    if split not in ("train", "test"):
        raise DataError(f"SemEval-2010 has the splits 'train' and 'test', found {split!r}")
    # Imported here because it is slow and only this function needs it.
    import datasets

    table = datasets.load_dataset(HUB_SEMEVAL2010, split=split)
    source, names = f"{HUB_SEMEVAL2010}/{split}", table.features["relation"].names
    first = 1 if split == "train" else SEMEVAL2010_TRAIN + 1
    schema = packaged_guide("semeval2010_short").schema

    def rows() -> Iterator[tuple[int, Example]]:
        pairs = zip(table["sentence"], table["relation"], strict=True)
        for id, (sentence, relation) in enumerate(pairs, start=first):
            with located(source, id):
                example = _official_example(id, sentence.strip(), names[relation], schema)
            yield id, example

    return collect(rows(), source=source)


def _parse_row(line: str, *, schema: Schema, dataset: str | None) -> Example:
    """The example of a JSON line, with every check that needs no other line."""
    row = decode_object(line)
    if dataset is not None and row.get("dataset", dataset) != dataset:
        raise DataError(f"a row of data set {row['dataset']!r} in a file of {dataset!r}")
    example = _example(row)
    for label in (example.label, *example.labels):
        schema.check_label(label)
    return example


def _example(row: dict[str, Any]) -> Example:
    """The example of a decoded row, with all its types checked."""
    labels = value(row, "labels", list, default=[])
    for label in labels:
        if not isinstance(label, str):
            raise DataError(f"'labels' must be a list of strings, found {kind_of(label)} in it")
    id = value(row, "id", str)
    if not id:
        raise DataError("'id' must not be empty")
    return Example(
        id=id,
        text=value(row, "text", str),
        head=_mention(value(row, "head", dict), "head"),
        tail=_mention(value(row, "tail", dict), "tail"),
        label=value(row, "label", str),
        labels=tuple(labels),
        split=value(row, "split", str, default=None),
        domain=value(row, "domain", str, default=None),
        reasoning=value(row, "reasoning", str, default=None),
    )


def _mention(row: dict[str, Any], role: str) -> Mention:
    return Mention(
        text=value(row, "text", str, of=role),
        start=value(row, "start", int, of=role),
        end=value(row, "end", int, of=role),
        type=value(row, "type", str, of=role, default=None),
    )


def _row(example: Example) -> dict[str, Any]:
    """The JSON object of an example; keys without a value are left out."""
    row: dict[str, Any] = {"id": example.id, "text": example.text}
    for role, mention in (("head", example.head), ("tail", example.tail)):
        row[role] = {"text": mention.text, "start": mention.start, "end": mention.end}
        if mention.type is not None:
            row[role]["type"] = mention.type
    row["label"] = example.label
    if example.labels:
        row["labels"] = list(example.labels)
    optional = {"split": example.split, "domain": example.domain, "reasoning": example.reasoning}
    return row | {key: value for key, value in optional.items() if value is not None}


def _official_rows(path: str | os.PathLike[str], schema: Schema) -> Iterator[tuple[int, Example]]:
    """Examples of the official form, with the line of their sentence."""
    sentence: tuple[int, re.Match[str]] | None = None
    label = ""

    def finish() -> Iterator[tuple[int, Example]]:
        if sentence is not None:
            number, match = sentence
            with located(path, number):
                example = _official_example(int(match["id"]), match["tagged"], label, schema)
            yield number, example

    for number, line in numbered_lines(resolve_data(path), blank=True):
        match = _OFFICIAL_SENTENCE.fullmatch(line)
        if match is not None:
            yield from finish()
            sentence, label = (number, match), ""
        elif sentence is not None and not label and line in schema:
            label = line
        elif line.strip() and not (label and line.startswith("Comment:")):
            raise DataError(
                f"{path}:{number}: expected '<number> TAB \"tagged sentence\"', then one of the "
                f"task's labels, then 'Comment:…', found {line!r}"
            )
    yield from finish()


def _official_example(id: int, tagged: str, label: str, schema: Schema) -> Example:
    """An example with the id, split and domain that the JSON form of the data set gives it."""
    if label:
        schema.check_label(label)
    plain = parse_tagged(tagged, id=f"semeval2010-{id}", label=label)
    split = "train" if id <= SEMEVAL2010_TRAIN else "test"
    return Example(
        plain.id, plain.text, plain.head, plain.tail, plain.label, split=split, domain="general"
    )
