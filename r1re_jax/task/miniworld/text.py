"""Writes a domain's guide and sentences."""

import dataclasses
import random

from r1re_jax.task import relations as task
from r1re_jax.task.miniworld import words
from r1re_jax.task.miniworld.domains import Cue, Domain, Relation

NONE_DEFINITION = "none of these."
RULES = ("Judge by the words between the two mentions.",)


def write_guide(domain: Domain) -> task.Guide:
    """Write the domain's guide: each definition lists the statements of its relation."""
    schema = task.Schema(
        tuple(
            task.Relation(
                name=relation.name,
                x_role=relation.x_role,
                y_role=relation.y_role,
                directed=True,
                definition="; ".join(cue.statement for cue in relation.cues) + ".",
            )
            for relation in domain.relations
        ),
        none=domain.none,
    )
    return task.make_guide(domain.title, schema, rules=RULES, none_definition=NONE_DEFINITION)


def write_example(
    domain: Domain,
    rng: random.Random,
    *,
    identity: str,
    distractors: float = 0.0,
    none_share: float = 0.0,
    plain: bool = False,
    strange: tuple[Cue, ...] = (),
    split: str | None = None,
) -> task.Example:
    """Write one sentence with a marked pair, its label and the reasoning that leads to it.

    Args:
        domain: relations to draw from, uniformly over relations and their cues.
        rng: source of all choices.
        identity: the example's id.
        distractors: probability of a second clause that states another relation of an unmarked
            pair.
        none_share: probability of the none label (if the domain has one): the pair is joined by a
            cue from `strange`, which the guide does not list.
        plain: no words but the pair, its cue and articles (and a distractor).
        strange: cues of no relation of this domain.
        split: carried into the example.
    """
    is_none = domain.none is not None and bool(strange) and rng.random() < none_share
    relation = None if is_none else rng.choice(domain.relations)
    cue = rng.choice(strange) if relation is None else rng.choice(relation.cues)
    first, second, third, fourth = rng.sample(domain.nouns, 4)
    richness = 0.0 if plain else 1.0
    before = rng.choice(words.OPENERS) + " " if rng.random() < 0.5 * richness else ""
    adverb = rng.choice(words.ADVERBS) + " " if rng.random() < 0.3 * richness else ""
    after = f" {rng.choice(words.CLOSERS)}" if rng.random() < 0.4 * richness else ""
    if rng.random() < distractors:
        other = rng.choice(rng.choice(domain.relations).cues)
        clause = f"the {third} {other.words} the {fourth}"
        if rng.random() < 0.5:
            before = f"{clause}, and " if not before else f"{before}{clause}, and "
        else:
            after = f", while {clause}{after}"
    head, tail = (mention(noun, rng, adjective=0.25 * richness) for noun in (first, second))
    left, middle = f"{before}the ", f" {adverb}{cue.words} the "
    text = f"{left}{head}{middle}{tail}{after}."
    text = text[0].upper() + text[1:]
    start = len(left) + len(head) + len(middle)
    label, reasoning = _answer(domain, relation, cue, said=f"{adverb}{cue.words}")
    return task.Example(
        id=identity,
        text=text,
        head=task.Mention(head, len(left), len(left) + len(head)),
        tail=task.Mention(tail, start, start + len(tail)),
        label=label,
        split=split,
        domain=domain.title,
        reasoning=reasoning,
    )


def quoting_guide(rng: random.Random, *, relations: int, length: int) -> task.Guide:
    """Write a guide whose definitions are `length` words without meaning each, to be quoted."""
    pool = rng.sample(words.SYLLABLES, relations * (length + 3))
    made = []
    for i in range(relations):
        name, x_role, y_role, *prose = pool[i * (length + 3) : (i + 1) * (length + 3)]
        made.append(task.Relation(name, x_role, y_role, True, f"X {' '.join(prose)} Y."))
    return task.make_guide(rng.choice(words.SYLLABLES), task.Schema(tuple(made)), rules=RULES)


def quoting_example(guide: task.Guide, rng: random.Random, *, identity: str) -> task.Example:
    """Ask to quote a definition from where the sentence's two words stand in it to its end."""
    relation = rng.choice(guide.schema.relations)
    prose = relation.definition.split()[1:-1]
    start = rng.randrange(len(prose) // 2)
    first, second = rng.sample(words.GENERAL_NOUNS, 2)
    cue = " ".join(prose[start : start + 2])
    text = f"The {first} {cue} the {second}."
    tail = len(text) - 1 - len(second)
    return task.Example(
        id=identity,
        text=text,
        head=task.Mention(first, 4, 4 + len(first)),
        tail=task.Mention(second, tail, tail + len(second)),
        label=f"{relation.name}(e1,e2)",
        split="train",
        domain=guide.title,
        reasoning=f"Cue: {' '.join(prose[start:])} Y\n- **{relation.name}**",
    )


def shuffle_definitions(guide: task.Guide, rng: random.Random) -> task.Guide:
    """Deal the definitions so that no relation keeps its own; names, roles and rules stay."""
    relations = list(guide.schema.relations)
    rng.shuffle(relations)
    # Each takes the definition of the next in a random cycle: nobody can keep its own.
    after = dict(zip(relations, relations[1:] + relations[:1], strict=True))
    dealt = tuple(
        dataclasses.replace(relation, definition=after[relation].definition)
        for relation in guide.schema.relations
    )
    schema = task.Schema(dealt, none=guide.schema.none)
    return task.make_guide(
        guide.title,
        schema,
        rules=guide.rules,
        none_definition=NONE_DEFINITION,
        entities=guide.entities,
    )


def mention(noun: str, rng: random.Random, *, adjective: float) -> str:
    """Return a noun, with the given probability behind an adjective."""
    return f"{rng.choice(words.ADJECTIVES)} {noun}" if rng.random() < adjective else noun


def _answer(domain: Domain, relation: Relation | None, cue: Cue, *, said: str) -> tuple[str, str]:
    """Return the label and its reasoning: what joins the pair, how the guide goes on, whose it is.

    The statement goes on with the role of e2: "stems from X" makes e2 the X, hence Relation(e2,e1).
    """
    if relation is None:
        return domain.none, f"Cue: {said}, not in the guide\n- **{domain.none}**"
    role = "Y" if cue.forward else "X"
    label = f"{relation.name}({'e1,e2' if cue.forward else 'e2,e1'})"
    return label, f"Cue: {said} {role}\n- **{relation.name}**"
