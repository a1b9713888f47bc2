"""The tasks that a guide can be read for, each behind one small protocol.

What is learned from a guide differs in its examples, the words of its prompts, what an answer is,
the rule that judges it and the figures that sum it up; all else is the same. A `PromptEncoder`
carries the task, so whoever turns examples into tokens also knows how to judge what comes back.
"""

import dataclasses
import enum
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from r1re_jax.task.completions import TAUGHT, Taught, sft_completion
from r1re_jax.task.metrics import summarise
from r1re_jax.task.readers import read_jsonl
from r1re_jax.task.relations import Example, Guide, Schema, TripletSchema, parse_tagged
from r1re_jax.task.rewards import RewardTotals, Verdict, parse_completion, relation_reward
from r1re_jax.task.templates import DEFAULT_TEMPLATE, TRIPLET_TEMPLATE, PromptTemplate
from r1re_jax.task.triplets.completions import triplet_completion
from r1re_jax.task.triplets.examples import TripletExample
from r1re_jax.task.triplets.metrics import summarise_triplets
from r1re_jax.task.triplets.readers import check_gold, read_triplets
from r1re_jax.task.triplets.rewards import (
    TripletTotals,
    TripletVerdict,
    parse_triplets,
    triplet_reward,
)


class TaskKind(enum.StrEnum):
    """What a policy is asked under a guide."""

    RELATION = "relation"  # the relation of a marked pair
    TRIPLETS = "triplets"  # all entities and relations of a sentence without marks


class AnyExample(Protocol):
    """What every example has, whatever the task: `Example`, `TripletExample`."""

    @property
    def id(self) -> str:
        """Unique within its data set."""
        ...

    @property
    def question(self) -> str:
        """What the prompt shows of it."""
        ...

    @property
    def answer(self) -> Any:
        """The gold answer, as predictions hold it; empty where it is not known."""
        ...

    @property
    def gold(self) -> frozenset[str]:
        """Every accepted answer as a string, to find the one that is right most often."""
        ...


class AnyVerdict(Protocol):
    """The judgement of a completion, whatever the task: `Verdict`, `TripletVerdict`."""

    reward: float
    format_ok: bool
    correct: bool
    predicted: Any
    problem: Any

    @property
    def figures(self) -> Mapping[str, float]:
        """Further figures whose means are logged."""
        ...


class Task(Protocol):
    """What a task gives: `RelationTask`, `TripletTask`."""

    @property
    def kind(self) -> TaskKind:
        """Its name in configs and commands."""
        ...

    @property
    def template(self) -> PromptTemplate:
        """The words of its prompts, where a policy brings no others."""
        ...

    @property
    def totals(self) -> Any:
        """What completions earn; a frozen dataclass of numbers."""
        ...

    def schema(self, guide: Guide) -> Any:
        """What answers are read by; GuideError where the guide lacks a part that it needs."""
        ...

    def read(self, path: str | os.PathLike[str], schema: Any) -> Sequence[AnyExample]:
        """Examples from JSON lines; DataError names file and line."""
        ...

    def asked(self, text: str, *, id: str) -> AnyExample:
        """An example without gold, from a text as people type it."""
        ...

    def check(self, example: AnyExample, schema: Any) -> None:
        """Raises DataError where the gold answer is none of the schema."""
        ...

    def completion(self, example: AnyExample, *, taught: Taught = TAUGHT) -> str:
        """The completion that a supervised warm start teaches."""
        ...

    def judge(self, text: str, example: AnyExample, schema: Any) -> AnyVerdict:
        """The verdict on a completion; any text at all gets one."""
        ...

    def extract(self, text: str, example: AnyExample, schema: Any) -> dict[str, Any]:
        """What a completion says, as a JSON object for people and scripts; gold is not read."""
        ...

    def summarise(
        self, predictions: Sequence[Mapping[str, Any]], schema: Any, **about: Any
    ) -> dict[str, Any]:
        """The figures of metrics.json from the rows of predictions.jsonl."""
        ...


@dataclasses.dataclass(frozen=True)
class RelationTask:
    """The relation of a marked pair: one label of the guide."""

    totals: RewardTotals = RewardTotals()

    @property
    def kind(self) -> TaskKind:
        """See `Task`, as for all that follows."""
        return TaskKind.RELATION

    @property
    def template(self) -> PromptTemplate:
        """The pair is marked by <e1> and <e2>."""
        return DEFAULT_TEMPLATE

    def schema(self, guide: Guide) -> Schema:
        """Labels."""
        return guide.schema

    def read(self, path: str | os.PathLike[str], schema: Schema) -> list[Example]:
        """See `r1re_jax.task.readers.read_jsonl`."""
        return read_jsonl(path, schema=schema)

    def asked(self, text: str, *, id: str) -> Example:
        """A text with its marks."""
        return parse_tagged(text, id=id)

    def check(self, example: Example, schema: Schema) -> None:
        """Every accepted label must be one of the guide."""
        for label in example.gold:
            schema.check_label(label)

    def completion(self, example: Example, *, taught: Taught = TAUGHT) -> str:
        """See `r1re_jax.task.completions.sft_completion`."""
        return sft_completion(example, taught=taught)

    def judge(self, text: str, example: Example, schema: Schema) -> Verdict:
        """See `r1re_jax.task.rewards.relation_reward`."""
        return relation_reward(text, example, schema, totals=self.totals)

    def extract(self, text: str, example: Example, schema: Schema) -> dict[str, Any]:
        """`{label, reasoning, text, problem}`."""
        parsed = parse_completion(text, schema)
        return {
            "label": parsed.predicted,
            "reasoning": parsed.reasoning,
            "text": text,
            "problem": parsed.problem,
        }

    def summarise(
        self, predictions: Sequence[Mapping[str, Any]], schema: Schema, **about: Any
    ) -> dict[str, Any]:
        """See `r1re_jax.task.metrics.summarise`."""
        return summarise(predictions, schema=schema, **about)


@dataclasses.dataclass(frozen=True)
class TripletTask:
    """All entities and relations of a sentence: one JSON object."""

    totals: TripletTotals = TripletTotals()

    @property
    def kind(self) -> TaskKind:
        """See `Task`, as for all that follows."""
        return TaskKind.TRIPLETS

    @property
    def template(self) -> PromptTemplate:
        """The sentence stands as it is."""
        return TRIPLET_TEMPLATE

    def schema(self, guide: Guide) -> TripletSchema:
        """Entity types and relations."""
        return guide.triplets

    def read(self, path: str | os.PathLike[str], schema: TripletSchema) -> list[TripletExample]:
        """See `r1re_jax.task.triplets.readers.read_triplets`."""
        return read_triplets(path, schema=schema)

    def asked(self, text: str, *, id: str) -> TripletExample:
        """A plain text."""
        return TripletExample(id, text)

    def check(self, example: TripletExample, schema: TripletSchema) -> None:
        """Every type and relation must be one of the guide."""
        check_gold(example, schema)

    def completion(self, example: TripletExample, *, taught: Taught = TAUGHT) -> str:
        """See `r1re_jax.task.triplets.completions.triplet_completion`."""
        return triplet_completion(example, taught=taught)

    def judge(self, text: str, example: TripletExample, schema: TripletSchema) -> TripletVerdict:
        """See `r1re_jax.task.triplets.rewards.triplet_reward`."""
        return triplet_reward(text, example, schema, totals=self.totals)

    def extract(self, text: str, example: TripletExample, schema: TripletSchema) -> dict[str, Any]:
        """`{entities, triplets, reasoning, text, problem}`; the lists are null if malformed."""
        parsed = parse_triplets(text, schema, sentence=example.text)
        said = dict.fromkeys(("entities", "triplets"))
        if parsed.predicted is not None:
            said = parsed.predicted.to_json()
        return said | {"reasoning": parsed.reasoning, "text": text, "problem": parsed.problem}

    def summarise(
        self, predictions: Sequence[Mapping[str, Any]], schema: TripletSchema, **about: Any
    ) -> dict[str, Any]:
        """See `r1re_jax.task.triplets.metrics.summarise_triplets`."""
        return summarise_triplets(predictions, schema=schema, **about)


RELATION, TRIPLETS = RelationTask(), TripletTask()


def make_task(
    kind: TaskKind,
    *,
    reward: RewardTotals = RELATION.totals,
    triplets: TripletTotals = TRIPLETS.totals,
) -> Task:
    """The task of a name; `reward` is what labels of pairs earn, `triplets` what extractions do."""
    return TripletTask(triplets) if kind is TaskKind.TRIPLETS else RelationTask(reward)
