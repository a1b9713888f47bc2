"""Miniworld's triplets: they follow from the guide alone, and the medical words stay out."""

import re
from collections.abc import Iterator

import pytest

from r1re_jax.task import miniworld
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.relations import Guide, parse_guide
from r1re_jax.task.triplets.completions import triplet_completion
from r1re_jax.task.triplets.examples import TripletExample
from r1re_jax.task.triplets.rewards import triplet_reward
from tests.medical import medical_words_in

STATED = [str(kind) for kind in miniworld.Kind if kind is not miniworld.Kind.QUOTING]
HARD = {"none_share": 0.3, "distractors": 0.5}


def lessons(*, steps: int = 2, seed: int = 0, **stage: object) -> Iterator[Lesson]:
    made = {"until": 1, "kinds": STATED, **stage}
    source = miniworld.triplet_source(trees=8, questions=10, seed=seed, stages=[made])
    return (lesson for step in range(steps) for lesson in source.lessons(step))


def statements(guide: Guide) -> Iterator[tuple[str, str, bool]]:
    """Cue, relation, and whether X stands before the cue."""
    for relation in guide.schema.relations:
        for statement in relation.definition.rstrip(".").split("; "):
            yield statement[2:-2], relation.name, statement.startswith("X ")


def types_of(guide: Guide) -> dict[tuple[str, str], str]:
    """(relation, X or Y) -> type, from the types' definitions."""
    return {
        (place[5:], place[0]): entity.name
        for entity in guide.entities
        for place in entity.definition.rstrip(".").split("; ")
    }


def read(example: TripletExample, guide: Guide) -> list[tuple[str, str, str, str, str]]:
    """What a reader finds clause by clause: (head, its type, relation, tail, its type)."""
    types, found = types_of(guide), []
    for clause in re.split(", and |, while ", example.text.rstrip(".")):
        sides = [
            (len(cue), relation, forward, f"the {left}", right)
            for cue, relation, forward in statements(guide)
            for left, middle, right in [clause.rpartition(f" {cue} the ")]
            if middle
        ]
        if sides:
            _, relation, forward, left, right = max(sides)
            pair = (left, right) if forward else (right, left)
            found.append((pair[0], types[relation, "X"], relation, pair[1], types[relation, "Y"]))
    return found


@pytest.mark.parametrize("options", [HARD, {"spelled": 0.5}, {"plain": True}, {"short": True}])
def test_triplets_follow_from_the_guide_alone(options: dict[str, object]) -> None:
    for lesson in lessons(seed=3, **options):
        check_readable(lesson.guide, lesson.examples)


@pytest.mark.parametrize("domain", ["general", "medical"])
def test_held_out_sets_can_be_read(domain: str) -> None:
    guide, examples = miniworld.triplet_examples(domain=domain, count=100)
    check_readable(guide, examples)
    assert len({example.id for example in examples}) == 100
    counts = {len(example.triplets) for example in examples}
    assert counts == {0, 1, 2, 3} or counts == {0, 1, 2}


def check_readable(guide: Guide, examples: tuple[TripletExample, ...]) -> None:
    """A reader finds as many triplets, and each of them at the place where gold has it."""
    for example in examples:
        found = read(example, guide)
        assert len(found) == len(example.triplets)
        for triplet, (head, head_type, relation, tail, tail_type) in zip(
            example.triplets, found, strict=True
        ):
            ends = example.entities[triplet.head], example.entities[triplet.tail]
            assert triplet.label == relation
            assert [end.type for end in ends] == [head_type, tail_type]
            # The reader cuts the sentence at cues: words around the mentions are left in.
            assert ends[0].text in head and ends[1].text in tail


def test_guides_are_read_back_and_have_no_none_label() -> None:
    for lesson in lessons(steps=1):
        assert parse_guide(lesson.guide.text) == lesson.guide
        assert lesson.guide.schema.none is None
        assert {
            role
            for relation in lesson.guide.schema.relations
            for role in (relation.x_role, relation.y_role)
        } == set(lesson.guide.triplets.types)


def test_reasoned_answers_earn_the_full_reward() -> None:
    for lesson in lessons(**HARD):
        for example in lesson.examples:
            verdict = triplet_reward(triplet_completion(example), example, lesson.guide.triplets)
            assert (verdict.reward, verdict.problem) == (3.0, None)
            for triplet in example.triplets:
                assert f"**{triplet.label}**" in example.reasoning


def test_distractors_and_strangers_set_the_number_of_triplets() -> None:
    def mean(**stage: float) -> float:
        numbers = [len(e.triplets) for lesson in lessons(**stage) for e in lesson.examples]
        return sum(numbers) / len(numbers)

    assert mean() == 1.0
    assert mean(distractors=1.0) == 3.0
    assert 1.8 < mean(distractors=0.5) < 2.2
    assert mean(none_share=1.0) == 0.0
    assert 0.6 < mean(none_share=0.3) < 0.8


def test_shuffled_definitions_mislead_a_reader() -> None:
    guide, examples = miniworld.triplet_examples(domain="medical", count=50, shuffled=True)
    plain, same = miniworld.triplet_examples(domain="medical", count=50)
    assert same == examples
    assert guide.entities == plain.entities
    for example in examples:
        gold = [triplet.label for triplet in example.triplets]
        assert not set(gold) & {relation for _, _, relation, _, _ in read(example, guide)} or (
            len(gold) > 1
        )


def test_lessons_are_a_function_of_seed_and_step() -> None:
    one, same, other = (
        miniworld.triplet_source(trees=2, questions=3, seed=seed) for seed in (1, 1, 2)
    )
    one.lessons(0)
    assert one.lessons(7) == same.lessons(7)
    assert one.lessons(7) != one.lessons(8)
    assert one.lessons(7) != other.lessons(7)
    ids = [e.id for step in range(4) for lesson in one.lessons(step) for e in lesson.examples]
    assert len(set(ids)) == len(ids) == 24


def test_no_lesson_holds_anything_medical() -> None:
    texts = (
        text
        for lesson in lessons(steps=20, spelled=0.2, **HARD)
        for text in (
            lesson.guide.text,
            *(f"{e.text} {triplet_completion(e)}" for e in lesson.examples),
        )
    )
    assert not medical_words_in(texts)


def test_what_has_no_triplets_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'quoting' have no triplets"):
        miniworld.triplet_source(
            trees=1, questions=1, stages=[{"until": 1, "kinds": ["quoting", "invented"]}]
        )
    with pytest.raises(ValueError, match=r"has the domains \['general', 'medical'\]"):
        miniworld.triplet_examples(domain="genral")
