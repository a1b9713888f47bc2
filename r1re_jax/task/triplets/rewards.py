"""The rule that judges an extraction: the format first, then how far entities and triplets agree.

The format is right iff the think and answer tags are (`r1re_jax.task.rewards`) and the stripped
answer is one JSON object with the keys `entities` and `triplets` and no others, both lists; an
entity is an object of the strings `text` and `type`, a triplet one of the strings `head`,
`relation` and `tail`. JSON is strict: no key twice, no NaN, no lone surrogates.

Words that do not stand in the sentence, and types and relations that the guide lacks, are wrong and
not malformed: they lower precision. `problem` names the first kind of them that there is, although
`predicted` holds the whole answer.

With the right format a completion earns, between `lowest` and `highest`, the mean of the F1 of its
entities and of its triplets, weighted; F1 is 1 where there is nothing to find and nothing was said.
The outer totals are those of pair classification (R1-RE, arXiv 2507.04642): +3, -0.5, and -3 for a
wrong format. The paper rewards no extraction, so the weights are ours.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1re_jax.task.rewards import Problem, parse_frame
from r1re_jax.task.schema import TripletSchema
from r1re_jax.task.semeval import Score
from r1re_jax.task.triplets.examples import Comparison, Extraction, TripletExample, compare


class TripletProblem(enum.StrEnum):
    """What is wrong with an answer whose tags are right; the last three are no format errors."""

    NOT_JSON = "not_json"
    REPEATED_KEY = "repeated_key"
    BAD_ENTITY = "bad_entity"
    BAD_TRIPLET = "bad_triplet"
    UNKNOWN_TYPE = "unknown_type"
    UNKNOWN_RELATION = "unknown_relation"
    SPAN_NOT_IN_TEXT = "span_not_in_text"

    @property
    def malformed(self) -> bool:
        """Whether the format is wrong; else something that was said cannot be right."""
        return self in (
            TripletProblem.NOT_JSON,
            TripletProblem.REPEATED_KEY,
            TripletProblem.BAD_ENTITY,
            TripletProblem.BAD_TRIPLET,
        )


@dataclass(frozen=True, kw_only=True)
class TripletTotals:
    """What a completion earns in all.

    Attributes:
      highest: everything right.
      lowest: the right format and nothing right.
      malformed: a wrong format.
      entity_weight: of the entities' F1 against that of the triplets.
      triplet_weight: of the triplets' F1.
    """

    highest: float = 3.0
    lowest: float = -0.5
    malformed: float = -3.0
    entity_weight: float = 1.0
    triplet_weight: float = 2.0

    def __post_init__(self) -> None:
        """Refuses weights that weigh nothing, and totals that would teach the opposite."""
        weights = self.entity_weight, self.triplet_weight
        if not (min(weights) >= 0 and sum(weights) > 0):
            raise ValueError(
                f"entity_weight and triplet_weight are {weights[0]} and {weights[1]}; both must be "
                "at least 0 and one above it"
            )
        if not self.malformed <= self.lowest < self.highest:
            raise ValueError(
                "expected malformed <= lowest < highest, found "
                f"{self.malformed}, {self.lowest}, {self.highest}"
            )

    def of(self, comparison: Comparison) -> float:
        """The reward of a well-formed answer."""
        weights = self.entity_weight, self.triplet_weight
        parts = map(agreement, (comparison.entities, comparison.triplets))
        share = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
        return self.lowest + (self.highest - self.lowest) * share


@dataclass(frozen=True)
class ParsedTriplets:
    """A completion taken apart.

    Attributes:
      predicted: what the answer says; None where the format is wrong.
      reasoning: as in `r1re_jax.task.rewards.Parsed`.
      problem: a format error, else the first kind of thing that cannot be right, else None.
    """

    predicted: Extraction | None
    reasoning: str | None
    problem: Problem | TripletProblem | None


@dataclass(frozen=True)
class TripletVerdict:
    """The judgement of a completion.

    Attributes:
      reward: the total.
      format_ok: whether the format is right.
      correct: whether the triplets are those of gold, all of them and no others.
      predicted: the answer as a JSON object; None where the format is wrong.
      problem: as in `ParsedTriplets`.
      comparison: counts of what was right; with a wrong format nothing was said.
    """

    reward: float
    format_ok: bool
    correct: bool
    predicted: dict[str, list[dict[str, str]]] | None
    problem: Problem | TripletProblem | None
    comparison: Comparison

    @property
    def figures(self) -> Mapping[str, float]:
        """Further figures whose means are logged: F1 of this answer, in [0, 100]."""
        scale = 100.0 if self.format_ok else 0.0
        return {
            "entity_f1": scale * agreement(self.comparison.entities),
            "triplet_f1": scale * agreement(self.comparison.triplets),
        }


def triplet_reward(
    text: str,
    example: TripletExample,
    schema: TripletSchema,
    *,
    totals: TripletTotals = TripletTotals(),
) -> TripletVerdict:
    """Judges a completion against the entities and triplets of its example.

    Args:
      text: the completion, without its stop token.
      example: the sentence with what is right.
      schema: of the guide in the prompt.
      totals: the reward of each outcome.

    Returns:
      The verdict; any text at all gets one.
    """
    parsed = parse_triplets(text, schema, sentence=example.text)
    found = parsed.predicted
    comparison = compare(example.extraction, found or Extraction(), schema)
    return TripletVerdict(
        reward=totals.malformed if found is None else totals.of(comparison),
        format_ok=found is not None,
        correct=found is not None and comparison.exact,
        predicted=None if found is None else found.to_json(),
        problem=parsed.problem,
        comparison=comparison,
    )


def agreement(score: Score) -> float:
    """F1 in [0, 1]; 1 where there is nothing to find and nothing was said."""
    return score.f1 / 100.0 if score.answered or score.actual else 1.0


def parse_triplets(text: str, schema: TripletSchema, *, sentence: str) -> ParsedTriplets:
    """Reads what a completion says of a sentence under a guide's schema. Never raises."""
    frame = parse_frame(text)
    if frame.answer is None:
        return ParsedTriplets(None, frame.reasoning, frame.problem)
    found, problem = parse_extraction(frame.answer)
    if found is not None:
        problem = _doubt(found, schema, sentence)
    return ParsedTriplets(found, frame.reasoning, problem)


def parse_extraction(
    answer: str,
) -> tuple[Extraction, None] | tuple[None, Problem | TripletProblem]:
    """What a stripped answer says and None, or None and what is wrong with its form."""
    if not answer:
        return None, Problem.BLANK_ANSWER
    try:
        said = json.loads(answer, object_pairs_hook=_once, parse_constant=_refuse)
    except _RepeatedKeyError:
        return None, TripletProblem.REPEATED_KEY
    except (ValueError, RecursionError):
        return None, TripletProblem.NOT_JSON
    if not _has_keys(said, ("entities", "triplets"), list):
        return None, Problem.BAD_ANSWER
    if not all(_has_keys(one, ("text", "type"), str) for one in said["entities"]):
        return None, TripletProblem.BAD_ENTITY
    if not all(_has_keys(one, ("head", "relation", "tail"), str) for one in said["triplets"]):
        return None, TripletProblem.BAD_TRIPLET
    found = Extraction.from_json(said)
    if not all(map(_is_unicode, (part for one in _everything(found) for part in one))):
        return None, TripletProblem.NOT_JSON
    return found, None


def _doubt(found: Extraction, schema: TripletSchema, sentence: str) -> TripletProblem | None:
    """The first kind of thing in an answer that cannot be right."""
    if not all(type in schema.types for _, type in found.entities):
        return TripletProblem.UNKNOWN_TYPE
    if not all(relation in schema.names for _, relation, _ in found.triplets):
        return TripletProblem.UNKNOWN_RELATION
    spans = [text for text, _ in found.entities]
    spans += [span for head, _, tail in found.triplets for span in (head, tail)]
    if not all(span and span in sentence for span in spans):
        return TripletProblem.SPAN_NOT_IN_TEXT
    return None


class _RepeatedKeyError(ValueError):
    """An object of an answer has a key twice."""


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _RepeatedKeyError
    return made


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _has_keys(value: Any, keys: Sequence[str], kind: type) -> bool:
    """Whether a value is an object of just these keys, all of one kind."""
    return (
        isinstance(value, dict)
        and sorted(value) == sorted(keys)
        and all(isinstance(one, kind) for one in value.values())
    )


def _everything(found: Extraction) -> list[tuple[str, ...]]:
    return [*found.entities, *found.triplets]


def _is_unicode(text: str) -> bool:
    """Whether a text can be written down; JSON can escape half a character, which cannot."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)
