"""Miniworld as a source of lessons: a step's guides and sentences are a function of the step."""

import dataclasses
import enum
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from r1re_jax.task.lessons import Lesson
from r1re_jax.task.miniworld import domains, words
from r1re_jax.task.miniworld.domains import Domain
from r1re_jax.task.miniworld.text import (
    quoting_example,
    quoting_guide,
    shuffle_definitions,
    write_example,
    write_guide,
)
from r1re_jax.task.relations import Example, Guide

Written = TypeVar("Written")
QUOTED_WORDS = 20
GENERAL_RELATIONS = len(domains.general().relations)


class Kind(enum.StrEnum):
    """Where a lesson's domain comes from."""

    QUOTING = "quoting"  # long definitions without meaning, to be quoted: teaches to look things up
    INVENTED = "invented"  # fresh names, roles and cues that mean nothing
    PERMUTED = "permuted"  # the general domain with the cues dealt to other relations
    GENERAL = "general"  # the general domain, with some of its cues listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
        until: the stage holds for steps below this; the last stage holds for ever.
        kinds: lesson kinds, drawn with equal probability (repeat one to weigh it).
        fewest: smallest number of relations in a guide.
        most: largest number (the general domain has nine).
        distractors: probability of a second clause that states another relation.
        none_share: share of the none label where the guide has one.
        spelled: share of invented words that are random letters.
        short: whether invented names and cues are single words of one syllable.
        plain: whether sentences have nothing but the pair and its cue.

    Raises:
        ValueError: numbers of relations that are out of order or range.
    """

    until: int
    kinds: tuple[Kind, ...]
    fewest: int = 2
    most: int = 9
    distractors: float = 0.0
    none_share: float = 0.0
    spelled: float = 0.0
    short: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        """Refuse a stage that no lesson fits."""
        if not 2 <= self.fewest <= self.most <= GENERAL_RELATIONS or not self.kinds:
            raise ValueError(
                f"a stage needs kinds and 2 <= fewest <= most <= {GENERAL_RELATIONS}, found {self}"
            )

    def write(
        self,
        one: Callable[..., Written],
        domain: Domain,
        rng: random.Random,
        *,
        name: str,
        questions: int,
    ) -> tuple[Written, ...]:
        """Write a lesson's examples.

        Args:
            one: `write_example` or its counterpart of another task.
            domain: of the lesson.
            rng: source of all choices.
            name: of the lesson; what the examples' ids begin with.
            questions: P.
        """
        strange = domains.strangers(domain, rng, relations=2, spelled=self.spelled)
        return tuple(
            one(
                domain,
                rng,
                identity=f"{name}-{i}",
                distractors=self.distractors,
                none_share=self.none_share,
                plain=self.plain,
                strange=strange,
                split="train",
            )
            for i in range(questions)
        )


# All kinds of lessons at the size and difficulty of the held-out sets.
FULL = Stage(
    until=0,
    kinds=(Kind.GENERAL, Kind.PERMUTED, Kind.INVENTED),
    fewest=6,
    distractors=0.2,
    none_share=0.2,
    spelled=0.2,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldSource:
    """Lessons of miniworld by stages; never of the medical domain.

    Attributes:
        stages: in order of `until`.
        trees: N, lessons of a step.
        questions: P, examples of a lesson.
        seed: another seed gives other lessons at every step.
    """

    stages: tuple[Stage, ...]
    trees: int
    questions: int
    seed: int = 0

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        """Return the N lessons of a step, all written for its stage."""
        stage = stage_at(self.stages, step)
        return tuple(
            self._lesson(
                random.Random(f"{self.seed}/{step}/{tree}"), stage, f"{self.seed}-{step}-{tree}"
            )
            for tree in range(self.trees)
        )

    def _lesson(self, rng: random.Random, stage: Stage, name: str) -> Lesson:
        count = rng.randint(stage.fewest, stage.most)
        kind = rng.choice(stage.kinds)
        if kind is Kind.QUOTING:
            guide = quoting_guide(rng, relations=count, length=QUOTED_WORDS)
            names = [f"{name}-{i}" for i in range(self.questions)]
            return Lesson(guide, tuple(quoting_example(guide, rng, identity=one) for one in names))
        none = stage.none_share > 0 and rng.random() < 0.5
        domain = draw_domain(rng, kind, count, none=none, spelled=stage.spelled, short=stage.short)
        strange = domains.strangers(domain, rng, relations=2, spelled=stage.spelled)
        examples = tuple(
            write_example(
                domain,
                rng,
                identity=f"{name}-{i}",
                distractors=stage.distractors,
                none_share=stage.none_share,
                plain=stage.plain,
                strange=strange,
                split="train",
            )
            for i in range(self.questions)
        )
        return Lesson(write_guide(domain), examples)


def source(
    *, trees: int, questions: int, seed: int = 0, stages: Sequence[Mapping[str, Any]] = ()
) -> WorldSource:
    """Make a source from plain values, as a config holds them.

    Args:
        trees: N, lessons of a step.
        questions: P, examples of a lesson.
        seed: another seed gives other lessons.
        stages: fields of each `Stage`; without any, all kinds of lessons at full size for ever.

    Raises:
        ValueError: a field that `Stage` does not have, an unknown kind, or sizes out of range.
    """
    made = read_stages(stages) or (FULL,)
    return WorldSource(stages=made, trees=trees, questions=questions, seed=seed)


def read_stages(stages: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Make stages from plain values; raises as `source`."""
    fields = {field.name for field in dataclasses.fields(Stage)}
    for stage in stages:
        if unknown := set(stage) - fields:
            raise ValueError(
                f"a miniworld stage has the fields {sorted(fields)}, found {sorted(unknown)}"
            )
    return tuple(Stage(**{**stage, "kinds": tuple(map(Kind, stage["kinds"]))}) for stage in stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that holds at a step."""
    return next((stage for stage in stages if step < stage.until), stages[-1])


def examples(
    *, domain: str, count: int = 400, seed: int = 0, shuffled: bool = False
) -> tuple[Guide, tuple[Example, ...]]:
    """Write a held-out set: the domain's guide and sentences that no training sees.

    General sentences are made of nouns that occur in no lesson; nothing of the medical domain does.

    Args:
        domain: "general" or "medical".
        count: how many sentences.
        seed: another seed gives other sentences.
        shuffled: deal the guide's definitions to other relations. Who reads the guide now answers
            wrong; who knows the names does not notice.

    Raises:
        ValueError: no such domain.
    """
    rng = random.Random(f"held-out/{domain}/{seed}")
    world = held_out_domain(domain)
    strange = domains.strangers(world, rng, relations=4)
    sentences = tuple(
        write_example(
            world,
            rng,
            identity=f"{domain}-{seed}-{i}",
            distractors=FULL.distractors,
            none_share=FULL.none_share,
            strange=strange,
            split="test",
        )
        for i in range(count)
    )
    guide = write_guide(world)
    return shuffle_definitions(guide, random.Random(seed)) if shuffled else guide, sentences


def held_out_domain(domain: str) -> domains.Domain:
    """Return a domain as held-out sets have it: one cue of each direction, nouns of no lesson.

    Raises:
        ValueError: no such domain.
    """
    made = {domains.GENERAL: domains.general, domains.MEDICAL: domains.medical}
    if domain not in made:
        raise ValueError(f"miniworld has the domains {sorted(made)}, found {domain!r}")
    world = domains.listed(made[domain](), random.Random(0), cues=1)
    if domain == domains.GENERAL:
        world = dataclasses.replace(world, nouns=words.GENERAL_NOUNS_HELD_OUT)
    return world


def draw_domain(
    rng: random.Random, kind: Kind, count: int, *, none: bool, spelled: float, short: bool
) -> domains.Domain:
    """Draw a lesson's domain of `count` relations; not for quoting, which has none."""
    if kind is Kind.INVENTED:
        return domains.invented(rng, relations=count, none=none, spelled=spelled, short=short)
    domain = domains.general()
    domain = domains.permuted(domain, rng) if kind is Kind.PERMUTED else domain
    domain = domains.listed(domains.subset(domain, rng, relations=count), rng, cues=1)
    return domain if none else dataclasses.replace(domain, none=None)
