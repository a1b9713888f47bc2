"""A domain of one's own from marked sentences and a list of labels: a guide to fill in, and data.

Sentences are CSV or TSV with the columns `text` (`<e1>` and `<e2>` marked, e1 the one that comes
first) and `label`, and `id` if there is one. Labels are lines `Name` or `Name: definition`; a name
that occurs in the sentences with a direction, as `Name(e1,e2)`, is a relation that has one.
"""

import collections
import csv
import dataclasses
import difflib
import io
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1re_jax.task.relations import (
    DataError,
    Example,
    Guide,
    Relation,
    Schema,
    make_guide,
    parse_tagged,
)

NONE_NAMES = ("none", "other", "no relation", "no_relation", "na")
"""A label of such a name, in either case, stands for none of the others."""

TODO = "TODO"
"""Stands in a guide wherever its author has something to say."""

RULES = ("Judge by what the sentence says, not by what you know.",)
_LABEL = re.compile(r"(?P<name>[^()]+?)(?P<direction>\((?:e1,e2|e2,e1)\))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """What was made of a user's files.

    Attributes:
        guide: with `TODO` where its author must say something.
        train: examples to learn from.
        test: held out.
    """

    guide: Guide
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def unsaid(self) -> int:
        """How many places of the guide are to be filled in."""
        return self.guide.text.count(TODO)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Label -> examples to learn from, and held out; every label of the guide is there."""
        train, test = (
            collections.Counter(one.label for one in of) for of in (self.train, self.test)
        )
        return {label: (train[label], test[label]) for label in self.guide.schema.labels}


def prepare(
    sentences: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    *,
    title: str,
    held_out: float = 0.4,
    seed: int = 0,
) -> Domain:
    """Make a domain of two files.

    Args:
        sentences: CSV, or TSV where the name ends in .tsv, UTF-8.
        labels: one a line.
        title: of the guide.
        held_out: share of each label's sentences to test on, rounded up.
        seed: of which ones.

    Raises:
        DataError: a file that cannot be read, or a line that cannot, by file and line.
        GuideError: names that no guide can have.
    """
    if not 0 < held_out < 1:
        raise DataError(f"the share of sentences to hold out is {held_out}; it must lie in (0, 1)")
    definitions = _read_labels(Path(labels))
    examples = _read_sentences(Path(sentences), names=definitions)
    directed = {_parts(one.label)[0] for one in examples if _parts(one.label)[1]}
    guide = _skeleton(definitions, directed, title=title)
    for example in examples:
        guide.schema.check_label(example.label)
    test = _held_out(examples, share=held_out, seed=seed)
    return Domain(
        guide=guide,
        train=tuple(one for one in examples if one.id not in test),
        test=tuple(one for one in examples if one.id in test),
    )


def _read_labels(path: Path) -> dict[str, str]:
    """Name -> definition, "" where the list has none."""
    found: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        name, _, definition = line.partition(":")
        name = _parts(name.strip())[0]
        if not name:
            continue
        if name in found and definition.strip():
            raise DataError(f"{path}:{number}: {name!r} is listed twice")
        found.setdefault(name, definition.strip())
    if not found:
        raise DataError(f"{path}: no labels; expected a name a line, or 'Name: definition'")
    return found


def _read_sentences(path: Path, *, names: Mapping[str, str]) -> tuple[Example, ...]:
    rows = csv.DictReader(
        io.StringIO(_text(path)), delimiter="\t" if path.suffix == ".tsv" else ","
    )
    missing = [name for name in ("text", "label") if name not in (rows.fieldnames or ())]
    if missing:
        raise DataError(
            f"{path}:1: no column {' or '.join(missing)}; found {', '.join(rows.fieldnames or ())}"
        )
    examples, seen = [], set()
    for row in rows:
        where, label = f"{path}:{rows.line_num}", (row["label"] or "").strip().replace(", ", ",")
        name = _parts(label)[0]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
            raise DataError(f"{where}: {label!r} is not in the list of labels{meant}")
        key = (row.get("id") or "").strip() or f"s-{len(examples) + 1}"
        if key in seen:
            raise DataError(f"{where}: the id {key!r} occurs twice")
        seen.add(key)
        try:
            examples.append(parse_tagged((row["text"] or "").strip(), id=key, label=label))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not examples:
        raise DataError(f"{path}: no sentences below the header")
    return tuple(examples)


def _skeleton(definitions: Mapping[str, str], directed: set[str], *, title: str) -> Guide:
    """A guide of these labels; what nobody has said yet is `TODO`."""
    none = next((name for name in definitions if name.lower() in NONE_NAMES), None)
    relations = tuple(
        Relation(
            name=name,
            x_role=f"{TODO} who or what fills X",
            y_role=f"{TODO} who or what fills Y",
            directed=name in directed,
            definition=definition or f"{TODO} when it holds, said of X and Y.",
        )
        for name, definition in definitions.items()
        if name != none
    )
    schema = Schema(relations, none)
    if none and definitions[none]:
        return make_guide(title, schema, rules=RULES, none_definition=definitions[none])
    return make_guide(title, schema, rules=RULES)


def _held_out(examples: Sequence[Example], *, share: float, seed: int) -> set[str]:
    """Ids to test on: of each label the share, at least one to learn from where there are two."""
    by_label: dict[str, list[str]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example.id)
    chosen: set[str] = set()
    for label, ids in sorted(by_label.items()):
        shuffled = random.Random(f"{seed}-{label}").sample(ids, len(ids))
        count = min(math.ceil(share * len(ids)), max(len(ids) - 1, 1))
        chosen |= set(shuffled[:count])
    return chosen


def _parts(label: str) -> tuple[str, str]:
    """Name and direction of a label; a text that is no label is all name."""
    match = _LABEL.fullmatch(label)
    return (label, "") if match is None else (match["name"].strip(), match["direction"] or "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.absolute()}: {error}") from None
