"""Miniworld's sentences with all their entities and triplets, and guides that name the types.

An entity's type is the role that it fills. A guide says of each type in which relations it is X or
Y, so that types, too, can be told only by reading.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from r1re_jax.task import relations as task
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.miniworld import domains, words
from r1re_jax.task.miniworld.domains import Cue, Domain, Relation
from r1re_jax.task.miniworld.lessons import (
    FULL,
    Kind,
    Stage,
    draw_domain,
    held_out_domain,
    read_stages,
    stage_at,
)
from r1re_jax.task.miniworld.text import mention, shuffle_definitions, write_guide
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample

# What joins a further clause to the sentence; each is used at most once, in this order.
JOINTS = (", and ", ", while ")
NO_ENTITY = "What no relation joins is no entity."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TripletWorldSource:
    """Lessons of miniworld by stages, with whole sentences to extract from; never medical.

    Attributes:
        stages: in order of `until`; `distractors` is the probability of each of two further
            clauses, `none_share` that of a clause whose cue no guide lists.
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
        names = [f"{self.seed}-{step}-{tree}" for tree in range(self.trees)]
        return tuple(self._lesson(random.Random(f"triplets/{name}"), stage, name) for name in names)

    def _lesson(self, rng: random.Random, stage: Stage, name: str) -> Lesson:
        kind, count = rng.choice(stage.kinds), rng.randint(stage.fewest, stage.most)
        domain = draw_domain(rng, kind, count, none=False, spelled=stage.spelled, short=stage.short)
        examples = stage.write(
            write_triplet_example, domain, rng, name=name, questions=self.questions
        )
        return Lesson(write_triplet_guide(domain), examples)


def triplet_source(
    *, trees: int, questions: int, seed: int = 0, stages: Sequence[Mapping[str, Any]] = ()
) -> TripletWorldSource:
    """Make a source from plain values, as a config holds them; as `miniworld.source`.

    Raises:
        ValueError: a field that `Stage` does not have, an unknown kind, sizes out of range, or
            quoting lessons, which state no relation.
    """
    made = read_stages(stages) or (FULL,)
    if any(Kind.QUOTING in stage.kinds for stage in made):
        raise ValueError(f"lessons of kind '{Kind.QUOTING}' have no triplets; leave them out")
    return TripletWorldSource(stages=made, trees=trees, questions=questions, seed=seed)


def triplet_examples(
    *, domain: str, count: int = 400, seed: int = 0, shuffled: bool = False
) -> tuple[task.Guide, tuple[TripletExample, ...]]:
    """Write a held-out set; as `miniworld.examples`, of the same domains and nouns.

    Raises:
        ValueError: no such domain.
    """
    rng = random.Random(f"held-out triplets/{domain}/{seed}")
    world = held_out_domain(domain)
    strange = domains.strangers(world, rng, relations=4)
    sentences = tuple(
        write_triplet_example(
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
    guide = write_triplet_guide(world)
    return shuffle_definitions(guide, random.Random(seed)) if shuffled else guide, sentences


def write_triplet_guide(domain: Domain) -> task.Guide:
    """Write the domain's guide with its types, and without a none label: nothing is said of none.

    A type's definition lists its places: "X of Cause-Effect; Y of Message-Topic."
    """
    places: dict[str, list[str]] = {}
    for relation in domain.relations:
        for letter, role in (("X", relation.x_role), ("Y", relation.y_role)):
            places.setdefault(role, []).append(f"{letter} of {relation.name}")
    types = tuple(task.EntityType(role, "; ".join(of) + ".") for role, of in places.items())
    plain = write_guide(dataclasses.replace(domain, none=None))
    rules = (*plain.rules, NO_ENTITY)
    return task.make_guide(plain.title, plain.schema, rules=rules, entities=types)


def write_triplet_example(
    domain: Domain,
    rng: random.Random,
    *,
    identity: str,
    distractors: float = 0.0,
    none_share: float = 0.0,
    plain: bool = False,
    strange: tuple[Cue, ...] = (),
    split: str | None = None,
) -> TripletExample:
    """Write one sentence of one to three clauses, with what each says and the reasoning.

    Args:
        domain: relations to draw from, uniformly over relations and their cues.
        rng: source of all choices.
        identity: the example's id.
        distractors: probability of each of two further clauses.
        none_share: probability that a clause has a cue from `strange`, which the guide does not
            list: it holds no entities and no triplet.
        plain: no words but pairs, cues and articles.
        strange: cues of no relation of this domain.
        split: carried into the example.
    """
    richness = 0.0 if plain else 1.0
    draft = _Draft(rng.choice(words.OPENERS) + " " if rng.random() < 0.5 * richness else "")
    nouns = iter(rng.sample(domain.nouns, 2 * (1 + len(JOINTS))))
    for joint in ("", *(joint for joint in JOINTS if rng.random() < distractors)):
        is_none = bool(strange) and rng.random() < none_share
        relation = None if is_none else rng.choice(domain.relations)
        cue = rng.choice(strange) if relation is None else rng.choice(relation.cues)
        adverb = rng.choice(words.ADVERBS) + " " if rng.random() < 0.3 * richness else ""
        pair = [mention(next(nouns), rng, adjective=0.25 * richness) for _ in range(2)]
        draft.add_clause(joint, pair, f"{adverb}{cue.words}", relation, cue)
    draft.text += f" {rng.choice(words.CLOSERS)}." if rng.random() < 0.4 * richness else "."
    return TripletExample(
        id=identity,
        text=draft.text[0].upper() + draft.text[1:],
        entities=tuple(draft.entities),
        triplets=tuple(draft.triplets),
        split=split,
        domain=domain.title,
        reasoning="\n".join(draft.thoughts),
    )


@dataclasses.dataclass
class _Draft:
    """A sentence as far as it is written."""

    text: str
    entities: list[Entity] = dataclasses.field(default_factory=list)
    triplets: list[Triplet] = dataclasses.field(default_factory=list)
    thoughts: list[str] = dataclasses.field(default_factory=list)

    def add_clause(
        self, joint: str, pair: Sequence[str], said: str, relation: Relation | None, cue: Cue
    ) -> None:
        """Add "the A said the B", and what it states."""
        spans = []
        for before, named in zip((f"{joint}the ", f" {said} the "), pair, strict=True):
            start = len(self.text) + len(before)
            self.text += before + named
            spans.append((named, start, start + len(named)))
        if relation is None:
            self.thoughts.append(f"Cue: {said}, not in the guide")
            return
        roles = [relation.x_role, relation.y_role]
        ends = [len(self.entities), len(self.entities) + 1]
        if not cue.forward:
            roles.reverse()
            ends.reverse()
        self.entities += [Entity(*span, role) for span, role in zip(spans, roles, strict=True)]
        self.triplets.append(Triplet(*ends, relation.name))
        # As of a marked pair: the statement goes on with the role of what follows it.
        self.thoughts.append(f"Cue: {said} {'Y' if cue.forward else 'X'}\n- **{relation.name}**")
