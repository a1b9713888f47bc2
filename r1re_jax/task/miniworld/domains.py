"""Domains of miniworld: which relations there are and which words state them.

A *cue* is what a sentence says between its two mentions: "stems from". A relation owns some cues
that run from X to Y ("X triggers Y") and some that run from Y to X ("Y stems from X"). A guide's
definitions list the cues, and nothing else tells which relation a cue states, or in which
direction.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from r1re_jax.task.miniworld import words

# Titles, in the order general, medical; invented domains are called after their first word.
GENERAL, MEDICAL = "general", "medical"
# Of an invented domain: words that several of its names and cues share, and how often they do.
COMMON_WORDS, COMMON_SHARE = 3, 0.5
# Of an invented domain that does not talk of the general domain's things.
INVENTED_NOUNS = 12


@dataclasses.dataclass(frozen=True)
class Cue:
    """Words that state a relation; `forward` if X stands before them, else Y does."""

    words: str
    forward: bool

    @property
    def statement(self) -> str:
        """The cue as a definition writes it: "X triggers Y" or "Y stems from X"."""
        return f"X {self.words} Y" if self.forward else f"Y {self.words} X"


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation with its roles and the cues that state it."""

    name: str
    x_role: str
    y_role: str
    cues: tuple[Cue, ...]


@dataclasses.dataclass(frozen=True)
class Domain:
    """A set of relations, an optional none label and the nouns that fill the mentions."""

    title: str
    relations: tuple[Relation, ...]
    nouns: tuple[str, ...]
    none: str | None = None


def _relation(name: str, roles: str, forward: str, backward: str) -> Relation:
    cues = [Cue(cue.strip(), True) for cue in forward.split(",")]
    cues += [Cue(cue.strip(), False) for cue in backward.split(",")]
    x_role, y_role = roles.split()
    return Relation(name, x_role, y_role, tuple(cues))


def general() -> Domain:
    """Relations in the style of SemEval-2010 Task 8 (Hendrickx et al., 2010)."""
    relations = (
        _relation(
            "Cause-Effect", "cause effect", "triggers, leads to", "stems from, follows after"
        ),
        _relation(
            "Instrument-Agency", "instrument agent", "helps, is handled by", "works with, operates"
        ),
        _relation(
            "Product-Producer", "product producer", "is made by, was written by", "builds, creates"
        ),
        _relation(
            "Content-Container", "content container", "lies inside, fills", "holds, is stuffed with"
        ),
        _relation("Entity-Origin", "entity origin", "comes from, departs", "releases, sends out"),
        _relation(
            "Entity-Destination",
            "entity destination",
            "moves into, travels toward",
            "receives, attracts",
        ),
        _relation(
            "Component-Whole", "component whole", "is part of, completes", "consists of, includes"
        ),
        _relation("Member-Collection", "member collection", "belongs to, joins", "gathers, unites"),
        _relation(
            "Message-Topic", "message topic", "describes, talks about", "is explained in, inspires"
        ),
    )
    return Domain(GENERAL, relations, words.GENERAL_NOUNS, none="Other")


def medical() -> Domain:
    """The nine relations of MDKG's mental-health domain; kept out of every training.

    Relation names: Gao et al., 2025 (MDKG), as R1-RE uses them (arXiv 2507.04642, section 4).
    """
    relations = (
        _relation("associated_with", "member topic", "coincides with", "accompanies"),
        _relation("treatment_for", "agent effect", "alleviates", "responds to"),
        _relation("occurs_in", "effect collection", "afflicts", "develops"),
        _relation("risk_factor_of", "cause effect", "fosters", "is provoked by"),
        _relation("hyponym_of", "member collection", "ranks under", "subsumes"),
        _relation("abbreviation_for", "message content", "stands for", "is shortened as"),
        _relation("characteristic_of", "component whole", "typifies", "manifests"),
        _relation("help_diagnose", "instrument topic", "confirms", "is detected via"),
        _relation("located_in", "entity container", "resides within", "encloses"),
    )
    return Domain(MEDICAL, relations, words.MEDICAL_NOUNS)


def invented(
    rng: random.Random,
    *,
    relations: int,
    none: bool = False,
    spelled: float = 0.0,
    short: bool = False,
) -> Domain:
    """Make a domain of names, roles and cues that mean nothing: only its guide explains them.

    Args:
        rng: source of all choices.
        relations: how many, each with a cue in either direction.
        none: whether there is a none label.
        spelled: share of words of random letters, see `words.invented_word`.
        short: whether names and cues are single words of one syllable, and mentions plain nouns.
    """
    style = rng.choice((_hyphenated, _underscored))
    taken: set[str] = set()

    def word(syllables: int = 1) -> str:
        return words.invented_word(rng, syllables=syllables, spelled=spelled)

    def fresh(make: Callable[[], str]) -> str:
        while (made := make()) in taken:
            continue
        taken.add(made)
        return made

    # As "of", "is" and "by" in real names and cues, these say nothing of which relation is meant.
    common = [word() for _ in range(COMMON_WORDS)]

    def phrase(sizes: Sequence[int]) -> list[str]:
        """Draw as many words as one of `sizes`; of several, the last is often a common one."""
        made = [word(rng.choice((1, 1, 2, 3))) for _ in range(rng.choice(sizes))]
        if len(made) > 1 and rng.random() < COMMON_SHARE:
            made[-1] = rng.choice(common)
        return made

    def name() -> str:
        return style([word()] if short else phrase((1, 2, 2, 3)))

    def cue() -> str:
        if short:
            return word()
        made = phrase((1, 2))
        return " ".join(rng.sample(made, len(made)))

    made = []
    for _ in range(relations):
        cues = (Cue(fresh(cue), True), Cue(fresh(cue), False))
        made.append(Relation(fresh(name), word(), word(), cues))
    label = rng.choice(("Other", "none", "undefined", "no_relation")) if none else None
    nouns = words.GENERAL_NOUNS
    if not short and rng.random() < 0.5:
        nouns = tuple(fresh(lambda: word(rng.choice((1, 2, 3)))) for _ in range(INVENTED_NOUNS))
    return Domain(word(2), tuple(made), nouns, none=label)


def permuted(domain: Domain, rng: random.Random) -> Domain:
    """Deal the cues to the relations anew, so that names no longer help: only definitions count."""
    cues = [relation.cues for relation in domain.relations]
    rng.shuffle(cues)
    relations = tuple(
        dataclasses.replace(relation, cues=mine)
        for relation, mine in zip(domain.relations, cues, strict=True)
    )
    return dataclasses.replace(domain, relations=relations)


def subset(domain: Domain, rng: random.Random, *, relations: int) -> Domain:
    """Keep some relations, in a new order."""
    return dataclasses.replace(domain, relations=tuple(rng.sample(domain.relations, relations)))


def listed(domain: Domain, rng: random.Random, *, cues: int) -> Domain:
    """Keep `cues` cues of each direction: a guide lists those, and sentences use no others."""

    def some(relation: Relation) -> Relation:
        kept = []
        for forward in (True, False):
            mine = [cue for cue in relation.cues if cue.forward is forward]
            kept += rng.sample(mine, min(cues, len(mine)))
        rng.shuffle(kept)
        return dataclasses.replace(relation, cues=tuple(kept))

    return dataclasses.replace(
        domain, relations=tuple(some(relation) for relation in domain.relations)
    )


def strangers(
    domain: Domain, rng: random.Random, *, relations: int, spelled: float = 0.0
) -> tuple[Cue, ...]:
    """Invent cues that the domain's guide does not list, for sentences of the none label.

    None equals or ends with a listed cue: a reader would find that one in the sentence.

    Args:
        domain: what is listed.
        rng: source of all choices.
        relations: how many relations to invent; their cues are returned.
        spelled: as in `invented`.
    """
    listed_cues = [f" {cue.words}" for relation in domain.relations for cue in relation.cues]
    made = [
        cue
        for relation in invented(rng, relations=relations, spelled=spelled).relations
        for cue in relation.cues
        if not any(f" {cue.words}".endswith(known) for known in listed_cues)
    ]
    return tuple(made) or strangers(domain, rng, relations=relations, spelled=spelled)


def _hyphenated(parts: Sequence[str]) -> str:
    return "-".join(part.capitalize() for part in parts)


def _underscored(parts: Sequence[str]) -> str:
    return "_".join(parts)
