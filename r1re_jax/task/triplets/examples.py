"""Sentences with their entities and triplets, and what an answer says of one.

An answer names words, not places: `{"entities": [{"text": …, "type": …}], "triplets": [{"head": …,
"relation": …, "tail": …}]}`. Two mentions of equal words and type are therefore one entity, and
what an answer says twice counts once.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1re_jax.task.relations import check_span
from r1re_jax.task.schema import DataError, TripletSchema
from r1re_jax.task.semeval import Score


@dataclass(frozen=True)
class Entity:
    """A typed span: `text` is what stands at [start, end)."""

    text: str
    start: int
    end: int
    type: str


@dataclass(frozen=True)
class Triplet:
    """A relation between two entities of an example, by their numbers; head fills role X."""

    head: int
    tail: int
    label: str


@dataclass(frozen=True)
class Extraction:
    """What an answer says, each thing once, in the order in which it was said first.

    Attributes:
      entities: (text, type).
      triplets: (text of the head, relation, text of the tail).
    """

    entities: tuple[tuple[str, str], ...] = ()
    triplets: tuple[tuple[str, str, str], ...] = ()

    def __post_init__(self) -> None:
        """Drops what was said before."""
        for name in ("entities", "triplets"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    def to_json(self) -> dict[str, list[dict[str, str]]]:
        """The answer as a JSON object, which `from_json` reads."""
        return {
            "entities": [{"text": text, "type": type} for text, type in self.entities],
            "triplets": [
                {"head": head, "relation": relation, "tail": tail}
                for head, relation, tail in self.triplets
            ],
        }

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> "Extraction":
        """The extraction of an answer of the right form."""
        return cls(
            tuple((one["text"], one["type"]) for one in answer["entities"]),
            tuple((one["head"], one["relation"], one["tail"]) for one in answer["triplets"]),
        )


@dataclass(frozen=True)
class TripletExample:
    """A sentence with all its entities and triplets.

    Attributes:
      id: unique within its data set.
      text: the sentence.
      entities: in any order; they may overlap.
      triplets: between them.
      split: for example "train".
      domain: for example "general".
      reasoning: a worked thought for supervised warm starts.

    Raises:
      DataError: a blank text, a span that does not match it, or a triplet of no entity.
    """

    id: str
    text: str
    entities: tuple[Entity, ...] = ()
    triplets: tuple[Triplet, ...] = ()
    split: str | None = None
    domain: str | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        """Checks spans and numbers."""
        if not self.text.strip():
            raise DataError("the text is blank; expected a sentence")
        for number, entity in enumerate(self.entities):
            check_span(f"entity {number}", entity, self.text)
        for number, triplet in enumerate(self.triplets):
            for role, which in (("head", triplet.head), ("tail", triplet.tail)):
                if not 0 <= which < len(self.entities):
                    raise DataError(
                        f"the {role} of triplet {number} is entity {which}; expected the number "
                        f"of one of {len(self.entities)} entities, counted from 0"
                    )

    @property
    def question(self) -> str:
        """What a prompt asks about: the sentence as it stands."""
        return self.text

    @functools.cached_property
    def extraction(self) -> Extraction:
        """What the right answer says."""
        texts = [entity.text for entity in self.entities]
        return Extraction(
            tuple((entity.text, entity.type) for entity in self.entities),
            tuple((texts[one.head], one.label, texts[one.tail]) for one in self.triplets),
        )

    @property
    def answer(self) -> dict[str, list[dict[str, str]]]:
        """The gold answer as predictions hold it."""
        return self.extraction.to_json()

    @property
    def gold(self) -> frozenset[str]:
        """The triplets of the right answer as one string: what a constant answer would have hit."""
        return frozenset({json.dumps(sorted(self.extraction.triplets), ensure_ascii=False)})


@dataclass(frozen=True)
class Comparison:
    """How far an answer agrees with gold, as counts.

    Attributes:
      entities: by text and type.
      triplets: by the texts of head and tail and the relation.
      strict: the same, right only where the answer gives head and tail the types that gold does.
    """

    entities: Score
    triplets: Score
    strict: Score

    @property
    def exact(self) -> bool:
        """Whether the triplets are those of gold, all of them and no others."""
        return self.triplets.matched == self.triplets.answered == self.triplets.actual


def compare(gold: Extraction, found: Extraction, schema: TripletSchema) -> Comparison:
    """Counts what an answer has in common with gold.

    Args:
      gold: what the right answer says.
      found: what is compared with it.
      schema: tells which relations have no direction: their head and tail may change places.
    """
    return Comparison(
        entities=_overlap(set(gold.entities), set(found.entities)),
        triplets=_overlap(ordered_triplets(gold, schema), ordered_triplets(found, schema)),
        strict=_overlap(_typed_triplets(gold, schema), _typed_triplets(found, schema)),
    )


def ordered_triplets(said: Extraction, schema: TripletSchema) -> set[tuple[str, str, str]]:
    """The triplets, where there is no direction with head and tail in alphabetical order."""
    return {
        (*sorted((head, tail)), relation)
        if relation in schema.directionless
        else (head, tail, relation)
        for head, relation, tail in said.triplets
    }


def _typed_triplets(said: Extraction, schema: TripletSchema) -> set[tuple[Any, ...]]:
    """The same with the types that are listed for the words of head and tail."""
    types: dict[str, set[str]] = {}
    for text, type in said.entities:
        types.setdefault(text, set()).add(type)
    kinds = {text: frozenset(found) for text, found in types.items()}
    return {
        (head, tail, relation, kinds.get(head), kinds.get(tail))
        for head, tail, relation in ordered_triplets(said, schema)
    }


def _overlap(gold: set[Any], found: set[Any]) -> Score:
    return Score(matched=len(gold & found), answered=len(found), actual=len(gold))
