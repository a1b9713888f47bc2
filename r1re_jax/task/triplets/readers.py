"""Sentences with entities and triplets from JSON lines, of our own form and of SciERC's, and back.

Nothing is dropped or repaired: what breaks the form is refused by file and line.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from r1re_jax.task.readers import resolve_data
from r1re_jax.task.rows import (
    collect,
    decode_object,
    kind_of,
    located,
    numbered_lines,
    value,
    write_rows,
)
from r1re_jax.task.schema import DataError, TripletSchema
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample
from r1re_jax.task.triplets.scierc import SENTENCES, document_examples


def read_triplets(path: str | os.PathLike[str], *, schema: TripletSchema) -> list[TripletExample]:
    """Reads examples from JSON lines, `.jsonl` or `.jsonl.gz`.

    A line is a sentence, `{"id", "text", "entities": [{"text", "start", "end", "type"}],
    "triplets": [{"head", "tail", "label"}]}`, head and tail numbers of entities, optionally with
    `split, domain, reasoning`; or a document of SciERC's form (Luan et al., 2018, also of DyGIE++),
    `{"doc_key", "sentences": [[token]], "ner": [[[first, last, type]]], "relations": [[[first,
    last, first, last, relation]]]}` with token numbers over the whole document, both ends included.
    Each of its sentences is an example: the tokens joined by blanks. Further keys are let be.

    Args:
      path: see `r1re_jax.task.readers.resolve_data`.
      schema: other types and relations are refused with the nearest one.

    Raises:
      DataError: a file that is missing, empty or unreadable, or a line that breaks the form
        (`file:line: …`).
    """

    def rows() -> Iterator[tuple[int, TripletExample]]:
        for number, line in numbered_lines(resolve_data(path)):
            with located(path, number):
                row = decode_object(line)
                made = document_examples(row) if SENTENCES in row else [_example(row)]
                for example in made:
                    check_gold(example, schema)
            yield from ((number, example) for example in made)

    return collect(rows(), source=path)


def write_triplets(path: str | os.PathLike[str], examples: Iterable[TripletExample]) -> None:
    """Writes examples so that `read_triplets` gives them back; equal examples give equal bytes."""
    write_rows(path, map(_row, examples))


def check_gold(example: TripletExample, schema: TripletSchema) -> None:
    """Raises DataError where an example has a type or relation that the schema lacks."""
    try:
        for entity in example.entities:
            schema.check_type(entity.type)
        for triplet in example.triplets:
            schema.check_relation(triplet.label)
    except DataError as error:
        raise DataError(f"example {example.id}: {error}") from None


def _example(row: dict[str, Any]) -> TripletExample:
    """The example of a decoded line of our own form, with all its types checked."""
    id = value(row, "id", str)
    if not id:
        raise DataError("'id' must not be empty")
    return TripletExample(
        id=id,
        text=value(row, "text", str),
        entities=tuple(_entity(*one) for one in _objects(row, "entities")),
        triplets=tuple(_triplet(*one) for one in _objects(row, "triplets")),
        split=value(row, "split", str, default=None),
        domain=value(row, "domain", str, default=None),
        reasoning=value(row, "reasoning", str, default=None),
    )


def _objects(row: dict[str, Any], key: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list, each with its name in messages."""
    for number, one in enumerate(value(row, key, list)):
        if not isinstance(one, dict):
            raise DataError(f"'{key}[{number}]' must be an object, found {kind_of(one)}")
        yield one, f"{key}[{number}]"


def _entity(row: dict[str, Any], name: str) -> Entity:
    return Entity(
        text=value(row, "text", str, of=name),
        start=value(row, "start", int, of=name),
        end=value(row, "end", int, of=name),
        type=value(row, "type", str, of=name),
    )


def _triplet(row: dict[str, Any], name: str) -> Triplet:
    return Triplet(
        head=value(row, "head", int, of=name),
        tail=value(row, "tail", int, of=name),
        label=value(row, "label", str, of=name),
    )


def _row(example: TripletExample) -> dict[str, Any]:
    """The JSON object of an example; keys without a value are left out."""
    optional = {"split": example.split, "domain": example.domain, "reasoning": example.reasoning}
    return {
        "id": example.id,
        "text": example.text,
        "entities": [
            {"text": one.text, "start": one.start, "end": one.end, "type": one.type}
            for one in example.entities
        ],
        "triplets": [
            {"head": one.head, "tail": one.tail, "label": one.label} for one in example.triplets
        ],
    } | {key: found for key, found in optional.items() if found is not None}
