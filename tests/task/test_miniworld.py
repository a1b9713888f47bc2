"""Miniworld: its labels follow from its guides, and the medical words stay out of training."""

import random
import re

import pytest

from r1re_jax.task import miniworld
from r1re_jax.task.miniworld import domains, words
from r1re_jax.task.miniworld.text import shuffle_definitions, write_example, write_guide
from r1re_jax.task.relations import Example, Guide, parse_guide
from r1re_jax.task.rewards import relation_reward

ALL_KINDS = [
    {
        "until": 1,
        "kinds": [str(kind) for kind in miniworld.Kind],
        "none_share": 0.2,
        "distractors": 0.5,
    }
]


def read(example: Example, guide: Guide) -> str:
    """Answer by reading: find the statement whose words stand between the mentions."""
    for relation in guide.schema.relations:
        for statement in relation.definition.rstrip(".").split("; "):
            cue = statement[2:-2]
            if re.search(rf"\b{re.escape(cue)} the $", example.between):
                return f"{relation.name}({'e1,e2' if statement[0] == 'X' else 'e2,e1'})"
    return guide.schema.none


def test_labels_follow_from_the_guide_alone() -> None:
    source = miniworld.source(trees=6, questions=20, seed=3, stages=ALL_KINDS)
    for step in range(5):
        for lesson in source.lessons(step):
            for example in lesson.examples:
                assert read(example, lesson.guide) == example.label


@pytest.mark.parametrize("domain", ["general", "medical"])
def test_held_out_sets_can_be_read(domain: str) -> None:
    guide, examples = miniworld.examples(domain=domain, count=100)
    assert [read(example, guide) for example in examples] == [example.label for example in examples]
    assert len({example.id for example in examples}) == 100


def test_shuffled_definitions_mislead_a_reader() -> None:
    guide, examples = miniworld.examples(domain="medical", count=100, shuffled=True)
    plain, same = miniworld.examples(domain="medical", count=100)
    assert same == examples
    assert [r.name for r in guide.schema.relations] == [r.name for r in plain.schema.relations]
    assert not any(read(example, guide) == example.label for example in examples)


def test_shuffling_deals_every_definition_once() -> None:
    guide, _ = miniworld.examples(domain="medical", count=1)
    for seed in range(20):
        dealt = shuffle_definitions(guide, random.Random(seed)).schema.relations
        pairs = list(zip(dealt, guide.schema.relations, strict=True))
        assert all(new.definition != old.definition for new, old in pairs)
        assert {new.definition for new, _ in pairs} == {old.definition for _, old in pairs}


def test_lessons_are_a_function_of_seed_and_step() -> None:
    one = miniworld.source(trees=2, questions=3, seed=1, stages=ALL_KINDS)
    other = miniworld.source(trees=2, questions=3, seed=1, stages=ALL_KINDS)
    one.lessons(0)
    assert one.lessons(7) == other.lessons(7)
    assert one.lessons(7) != one.lessons(8)
    assert one.lessons(7) != miniworld.source(
        trees=2, questions=3, seed=2, stages=ALL_KINDS
    ).lessons(7)


def test_ids_differ_between_all_lessons() -> None:
    source = miniworld.source(trees=3, questions=5)
    ids = [e.id for step in range(4) for lesson in source.lessons(step) for e in lesson.examples]
    assert len(set(ids)) == len(ids) == 60


def test_stages_follow_each_other() -> None:
    stages = [
        {"until": 2, "kinds": ["invented"], "fewest": 2, "most": 2},
        {"until": 4, "kinds": ["general"], "fewest": 9, "most": 9},
    ]
    source = miniworld.source(trees=1, questions=1, stages=stages)
    sizes = [len(source.lessons(step)[0].guide.schema.relations) for step in range(6)]
    assert sizes == [2, 2, 9, 9, 9, 9]
    general = {relation.name for relation in domains.general().relations}
    assert not general & {r.name for r in source.lessons(0)[0].guide.schema.relations}
    assert general == {r.name for r in source.lessons(2)[0].guide.schema.relations}


def test_reasoned_answers_earn_the_full_reward() -> None:
    for lesson in miniworld.source(trees=4, questions=8, stages=ALL_KINDS).lessons(0):
        for example in lesson.examples:
            completion = f"<think>{example.reasoning}</think><answer>{example.label}</answer>"
            assert relation_reward(completion, example, lesson.guide.schema).reward == 3


def test_permuted_lessons_contradict_the_names() -> None:
    rng = random.Random(0)
    general = domains.general()
    moved = domains.permuted(general, rng)
    assert {r.name for r in moved.relations} == {r.name for r in general.relations}
    assert {r.cues for r in moved.relations} == {r.cues for r in general.relations}
    assert moved != general


def medical_strings() -> set[str]:
    """Everything that is the medical domain's own: names, cues and their telling words, nouns."""
    own = set(words.MEDICAL_NOUNS)
    for relation in domains.medical().relations:
        own.add(relation.name)
        own |= {cue.words for cue in relation.cues}
        own |= {word for cue in relation.cues for word in cue.words.split() if len(word) > 5}
    return own


def test_no_lesson_holds_anything_medical() -> None:
    source = miniworld.source(trees=4, questions=8, seed=0, stages=ALL_KINDS)
    text = "\n".join(
        part
        for step in range(200)
        for lesson in source.lessons(step)
        for part in (
            lesson.guide.text,
            *(f"{e.text} {e.reasoning} {e.label}" for e in lesson.examples),
        )
    )
    found = [own for own in medical_strings() if re.search(rf"\b{re.escape(own)}\b", text)]
    assert not found


def test_general_held_out_nouns_are_in_no_lesson() -> None:
    assert not set(words.GENERAL_NOUNS) & set(words.GENERAL_NOUNS_HELD_OUT)
    assert not set(words.GENERAL_NOUNS) & set(words.MEDICAL_NOUNS)


def test_no_cue_states_two_relations() -> None:
    cues = [
        c.words for d in (domains.general(), domains.medical()) for r in d.relations for c in r.cues
    ]
    assert len(set(cues)) == len(cues)


def test_an_invented_domain_repeats_no_word() -> None:
    domain = domains.invented(random.Random(5), relations=9, none=True)
    taken = [r.name for r in domain.relations] + [c.words for r in domain.relations for c in r.cues]
    assert len(set(taken)) == len(taken)
    assert parse_guide(write_guide(domain).text).schema == write_guide(domain).schema


def test_none_needs_a_cue_that_the_guide_lacks() -> None:
    domain = domains.general()
    strange = (domains.Cue("blorps", forward=True),)
    rng = random.Random(0)
    made = [
        write_example(domain, rng, identity=str(i), none_share=1.0, strange=strange)
        for i in range(5)
    ]
    assert {example.label for example in made} == {"Other"}
    assert all("blorps" in example.between for example in made)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"until": 1, "kinds": ["invented"], "fewest": 1}, "2 <= fewest"),
        ({"until": 1, "kinds": ["invented"], "fewest": 5, "most": 4}, "fewest <= most"),
        ({"until": 1, "kinds": ["inventd"]}, "inventd"),
        ({"until": 1, "kinds": ["invented"], "mots": 4}, "mots"),
    ],
)
def test_bad_stages_are_refused(stage: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        miniworld.source(trees=1, questions=1, stages=[stage])


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="medcal"):
        miniworld.examples(domain="medcal")
