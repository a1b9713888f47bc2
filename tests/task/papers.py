"""A guide with entity types, a sentence with triplets: what the tests of extraction share."""

from typing import Any

from r1re_jax.task.relations import (
    Guide,
    parse_guide,
)
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample

GUIDE = """# Papers

## Entities

- **Method**: a way to do something.
- **Task**: what is to be done.

## Relations

- **Used-For(X = means, Y = end)**: X serves Y.
- **Near(X = one, Y = other)** [no direction]: X and Y are alike.
- **Other**: none of these.

## Rules

1. Judge by the sentence.
"""
TEXT = "CRF helps NER, as HMM does."
EXAMPLE = TripletExample(
    "p1",
    TEXT,
    (Entity("CRF", 0, 3, "Method"), Entity("NER", 10, 13, "Task"), Entity("HMM", 18, 21, "Method")),
    (Triplet(0, 1, "Used-For"), Triplet(2, 0, "Near")),
)


def guide() -> Guide:
    """The guide, read."""
    return parse_guide(GUIDE, source="g.md")


SCHEMA = guide().triplets


def answer_of(entities: list[list[str]], triplets: list[list[str]]) -> dict[str, Any]:
    """An answer as JSON holds it: entities (text, type), triplets (head, relation, tail)."""
    return {
        "entities": [{"text": text, "type": type} for text, type in entities],
        "triplets": [{"head": h, "relation": r, "tail": t} for h, r, t in triplets],
    }


RIGHT = answer_of(
    [["CRF", "Method"], ["NER", "Task"], ["HMM", "Method"]],
    [["CRF", "Used-For", "NER"], ["HMM", "Near", "CRF"]],
)
