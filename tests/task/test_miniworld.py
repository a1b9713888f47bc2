"""Miniworld: its labels follow from its guides, and the medical words stay out of training."""

import importlib.util
import pathlib
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from r1re_jax.task import miniworld
from r1re_jax.task.completions import sft_completion
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.miniworld import domains, words
from r1re_jax.task.miniworld.text import shuffle_definitions, write_example, write_guide
from r1re_jax.task.relations import Example, Guide, parse_guide
from r1re_jax.task.rewards import relation_reward
from tests.medical import medical_words_in

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text("utf-8")
)
STATED = [str(kind) for kind in miniworld.Kind if kind is not miniworld.Kind.QUOTING]
HARD = {"none_share": 0.2, "distractors": 0.5}


def lessons(*, steps: int = 1, seed: int = 0, **stage: object) -> Iterator[Lesson]:
    """Lessons of one stage, of stated kinds unless told otherwise: eight of ten examples a step."""
    made = {"until": 1, "kinds": STATED, **stage}
    source = miniworld.source(trees=8, questions=10, seed=seed, stages=[made])
    return (lesson for step in range(steps) for lesson in source.lessons(step))


def statements(guide: Guide) -> Iterator[tuple[str, str]]:
    """The cues of a guide's definitions, each with the label of a pair that it joins."""
    for relation in guide.schema.relations:
        for statement in relation.definition.rstrip(".").split("; "):
            direction = "e1,e2" if statement.startswith("X ") else "e2,e1"
            yield statement[2:-2], f"{relation.name}({direction})"


def read(example: Example, guide: Guide) -> str | None:
    """Answer by reading: find the statement that stands right before e2.

    The longest counts, since a cue can be the tail of another cue.
    """
    found = [
        (cue, label) for cue, label in statements(guide) if example.between.endswith(f" {cue} the ")
    ]
    return max(found, key=lambda pair: len(pair[0]))[1] if found else guide.schema.none


def texts_of(lesson: Lesson) -> Iterator[str]:
    """Everything of a lesson that a policy is trained on."""
    yield lesson.guide.text
    for example in lesson.examples:
        yield f"{example.tagged} {sft_completion(example)}"


@pytest.mark.parametrize("options", [HARD, {"spelled": 0.5}, {"plain": True}, {"short": True}])
def test_labels_follow_from_the_guide_alone(options: Mapping[str, object]) -> None:
    for lesson in lessons(steps=6, seed=3, **options):
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
    stages = [{"until": 1, "kinds": [str(kind) for kind in miniworld.Kind], **HARD}]
    one, same, other = (
        miniworld.source(trees=2, questions=3, seed=seed, stages=stages) for seed in (1, 1, 2)
    )
    one.lessons(0)
    assert one.lessons(7) == same.lessons(7)
    assert one.lessons(7) != one.lessons(8)
    assert one.lessons(7) != other.lessons(7)


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


@pytest.mark.parametrize("kind", miniworld.Kind)
def test_reasoned_answers_earn_the_full_reward(kind: miniworld.Kind) -> None:
    for lesson in lessons(kinds=[kind], most=4, **HARD):
        for example in lesson.examples:
            assert (
                relation_reward(sft_completion(example), example, lesson.guide.schema).reward == 3
            )


def test_reasoning_quotes_the_statement_and_names_the_relation() -> None:
    for lesson in lessons(**HARD):
        for example in lesson.examples:
            name = lesson.guide.schema.relation_of(example.label)
            assert f"**{name}**" in example.reasoning
            if name == lesson.guide.schema.none:
                continue
            relation = next(r for r in lesson.guide.schema.relations if r.name == name)
            assert any(
                statement[2:] in example.reasoning and f" {statement[2:-2]} the " in example.between
                for statement in relation.definition.rstrip(".").split("; ")
            )


def test_quoting_lessons_ask_for_the_rest_of_a_definition() -> None:
    for lesson in lessons(kinds=["quoting"], most=4):
        prose = [relation.definition for relation in lesson.guide.schema.relations]
        # Every word stands in one place only: what is quoted is never in doubt.
        said = " ".join(prose).replace(".", "").split()
        assert len(set(said) - {"X", "Y"}) == len(said) - 2 * len(prose)
        for example in lesson.examples:
            cue = example.between.removesuffix(" the ").strip()
            (holder,) = [r for r in lesson.guide.schema.relations if f" {cue} " in r.definition]
            assert example.label == f"{holder.name}(e1,e2)"
            quote = holder.definition[holder.definition.index(cue) :].rstrip(".")
            assert quote in example.reasoning and quote in lesson.guide.text
            assert f"**{holder.name}**" in example.reasoning


def test_plain_sentences_have_nothing_but_the_pair_and_its_cue() -> None:
    for lesson in lessons(plain=True):
        cues = {cue for cue, _ in statements(lesson.guide)}
        for example in lesson.examples:
            assert example.text.startswith("The ") and example.text.endswith(
                example.tail.text + "."
            )
            assert example.head.start == 4 and example.tail.end == len(example.text) - 1
            assert example.between.removesuffix(" the ").strip() in cues
            assert re.fullmatch("[a-z]+ [a-z]+", f"{example.head.text} {example.tail.text}")


def test_distractors_state_a_relation_of_another_pair() -> None:
    for lesson in lessons(plain=True, distractors=1.0):
        cues = {cue for cue, _ in statements(lesson.guide)}
        for example in lesson.examples:
            before, after = example.text[: example.head.start], example.text[example.tail.end :]
            clause = before if ", and " in before else after
            assert any(f" {cue} the " in clause for cue in cues)


def test_invented_words_are_made_of_syllables() -> None:
    rng = random.Random(0)
    assert len(set(words.SYLLABLES)) == len(words.SYLLABLES)
    for _ in range(100):
        assert words.invented_word(rng) in words.SYLLABLES
        word = words.invented_word(rng, syllables=2)
        ends = [end for end in range(len(word)) if word[:end] in words.SYLLABLES]
        assert any(word[end:] in words.SYLLABLES for end in ends)


def test_spelled_words_are_random_letters_or_fragments_of_english() -> None:
    rng = random.Random(0)
    english = " ".join(words.GENERAL_NOUNS + words.ADJECTIVES)
    made = [words.invented_word(rng, spelled=1.0) for _ in range(400)]
    pieces = [
        any(word[:cut] in english and word[cut:] in english for cut in range(2, len(word) - 1))
        for word in made
    ]
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in made)
    assert all(piece or len(word) <= 5 for piece, word in zip(pieces, made, strict=True))
    assert sum(len(word) > 5 for word in made) > 50
    assert len(set(made)) > 380


def test_spelled_sets_the_share_of_words_that_are_no_syllables() -> None:
    def strange(**stage: object) -> float:
        roles = [
            role in words.SYLLABLES
            for lesson in lessons(kinds=["invented"], **stage)
            for relation in lesson.guide.schema.relations
            for role in (relation.x_role, relation.y_role)
        ]
        return 1 - sum(roles) / len(roles)

    assert strange() == 0
    assert 0.2 < strange(spelled=0.5) < 0.8
    assert strange(spelled=1.0) > 0.9


def test_short_names_and_cues_are_single_syllables() -> None:
    for lesson in lessons(kinds=["invented"], short=True):
        assert {cue for cue, _ in statements(lesson.guide)} <= set(words.SYLLABLES)
        names = {relation.name.lower() for relation in lesson.guide.schema.relations}
        assert names <= set(words.SYLLABLES)


def test_strangers_end_with_no_listed_cue() -> None:
    # Most syllables are listed: a cue drawn at random is often a listed one, or ends with one.
    listed = tuple(domains.Cue(letter, forward=True) for letter in words.SYLLABLES[:200])
    domain = domains.Domain("t", (domains.Relation("R", "x", "y", listed),), words.GENERAL_NOUNS)
    for seed in range(20):
        strange = domains.strangers(domain, random.Random(seed), relations=1)
        assert strange
        for cue in strange:
            assert cue.words.split()[-1] not in words.SYLLABLES[:200]


def test_invented_relations_share_words_and_mentions_can_be_invented() -> None:
    made = [domains.invented(random.Random(seed), relations=9) for seed in range(20)]
    for domain in made:
        texts = [re.split("[-_]", relation.name.lower()) for relation in domain.relations]
        texts += [cue.words.split() for relation in domain.relations for cue in relation.cues]
        parts = [part for text in texts if len(text) > 1 for part in text]
        assert max(parts.count(part) for part in parts) > 1
    plain = [domain.nouns == words.GENERAL_NOUNS for domain in made]
    assert 3 < sum(plain) < 17


def test_permuted_lessons_contradict_the_names() -> None:
    rng = random.Random(0)
    general = domains.general()
    moved = domains.permuted(general, rng)
    assert {r.name for r in moved.relations} == {r.name for r in general.relations}
    assert {r.cues for r in moved.relations} == {r.cues for r in general.relations}
    assert moved != general


def test_the_search_finds_what_is_medical() -> None:
    guide, examples = miniworld.examples(domain="medical", count=20)
    found = medical_words_in([guide.text, *(example.text for example in examples)])
    assert {"risk_factor_of", "fosters", "is provoked by", "provoked"} <= found
    assert len(found & set(words.MEDICAL_NOUNS)) > 10
    assert not medical_words_in(["A fostered ticsy riverbed."])


def test_no_lesson_holds_anything_medical() -> None:
    every = {"kinds": [str(kind) for kind in miniworld.Kind], "spelled": 0.2, **HARD}
    texts = (text for lesson in lessons(steps=30, **every) for text in texts_of(lesson))
    assert not medical_words_in(texts)


def training_options(path: pathlib.Path) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Seed, steps and miniworld's options of every variant of a config that trains on miniworld."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variant in [(), *((stage,) for stage in getattr(module, "STAGES", ()))]:
        config = module.get_config(*variant)
        if config.data.train.kind == "miniworld":
            steps = sum(config[phase].steps for phase in ("sft", "grpo") if phase in config)
            yield config.seed, steps, config.data.train.get("options", {})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_trains_on_anything_medical(path: pathlib.Path) -> None:
    for seed, steps, options in training_options(path):
        source = miniworld.source(trees=4, questions=12, seed=seed, **options)
        searched = [lesson for step in range(0, steps, 20) for lesson in source.lessons(step)]
        assert not medical_words_in(text for lesson in searched for text in texts_of(lesson))


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
