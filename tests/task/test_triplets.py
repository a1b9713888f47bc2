"""Triplet extraction: the grammar of answers, the rule, completions to learn."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.task.completions import Taught, Thoughts
from r1re_jax.task.rewards import Problem
from r1re_jax.task.schema import DataError
from r1re_jax.task.triplets.completions import answer_text, triplet_completion
from r1re_jax.task.triplets.examples import Entity, Extraction, Triplet, TripletExample, compare
from r1re_jax.task.triplets.rewards import (
    TripletProblem,
    TripletTotals,
    parse_extraction,
    parse_triplets,
    triplet_reward,
)
from tests.task.papers import EXAMPLE, RIGHT, SCHEMA, TEXT, answer_of


def _text(answer: Any) -> str:
    shown = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>why</think><answer>{shown}</answer>"


# --- the grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", Problem.EMPTY),
        (json.dumps(RIGHT), Problem.NO_THINK),
        (_text(RIGHT) + ".", Problem.TEXT_AFTER),
        (_text(RIGHT).replace("why", " "), Problem.BLANK_THOUGHTS),
        (_text(" "), Problem.BLANK_ANSWER),
        (_text("none"), TripletProblem.NOT_JSON),
        (_text("{'entities': [], 'triplets': []}"), TripletProblem.NOT_JSON),
        (_text('{"entities": [], "triplets": []} {}'), TripletProblem.NOT_JSON),
        (_text('{"entities": [], "triplets": [],}'), TripletProblem.NOT_JSON),
        (_text('```json\n{"entities": [], "triplets": []}\n```'), TripletProblem.NOT_JSON),
        (_text('{"entities": [NaN], "triplets": []}'), TripletProblem.NOT_JSON),
        (_text('{"entities": [-Infinity], "triplets": []}'), TripletProblem.NOT_JSON),
        (_text("[" * 100_000), TripletProblem.NOT_JSON),
        (_text("1" * 10_000), TripletProblem.NOT_JSON),
        (_text("__import__('os')"), TripletProblem.NOT_JSON),
        (_text(answer_of([["\ud800", "Task"]], [])), TripletProblem.NOT_JSON),
        (_text('{"entities": [], "entities": [], "triplets": []}'), TripletProblem.REPEATED_KEY),
        (
            _text('{"entities": [{"text": "a", "type": "b", "text": "a"}], "triplets": []}'),
            TripletProblem.REPEATED_KEY,
        ),
        (_text("[]"), Problem.BAD_ANSWER),
        (_text("null"), Problem.BAD_ANSWER),
        (_text({"entities": []}), Problem.BAD_ANSWER),
        (_text({"entities": [], "triplets": {}}), Problem.BAD_ANSWER),
        (_text({"entities": [], "triplets": [], "notes": []}), Problem.BAD_ANSWER),
        (_text({"entities": ["CRF"], "triplets": []}), TripletProblem.BAD_ENTITY),
        (_text({"entities": [{"text": "CRF"}], "triplets": []}), TripletProblem.BAD_ENTITY),
        (
            _text({"entities": [{"text": "CRF", "type": None}], "triplets": []}),
            TripletProblem.BAD_ENTITY,
        ),
        (
            _text({"entities": [{"text": "CRF", "type": "Task", "start": 0}], "triplets": []}),
            TripletProblem.BAD_ENTITY,
        ),
        (_text({"entities": [], "triplets": [["a", "b", "c"]]}), TripletProblem.BAD_TRIPLET),
        (
            _text({"entities": [], "triplets": [{"head": 0, "relation": "Near", "tail": 1}]}),
            TripletProblem.BAD_TRIPLET,
        ),
    ],
)
def test_malformed_completions_have_their_code(text: str, problem: Any) -> None:
    verdict = triplet_reward(text, EXAMPLE, SCHEMA)
    assert (verdict.problem, verdict.predicted, verdict.format_ok) == (problem, None, False)
    assert verdict.reward == -3.0 and not verdict.correct and problem.malformed
    assert verdict.figures == {"entity_f1": 0.0, "triplet_f1": 0.0}
    nothing = TripletExample("n", TEXT)
    assert triplet_reward(text, nothing, SCHEMA).figures["triplet_f1"] == 0.0


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (answer_of([["CRF", "Tool"]], []), TripletProblem.UNKNOWN_TYPE),
        (answer_of([["CRF", "method"]], []), TripletProblem.UNKNOWN_TYPE),
        (answer_of([], [["CRF", "Uses", "NER"]]), TripletProblem.UNKNOWN_RELATION),
        (answer_of([], [["CRF", "Other", "NER"]]), TripletProblem.UNKNOWN_RELATION),
        (answer_of([["crf", "Method"]], []), TripletProblem.SPAN_NOT_IN_TEXT),
        (answer_of([["", "Method"]], []), TripletProblem.SPAN_NOT_IN_TEXT),
        (answer_of([], [["CRF", "Near", "SVM"]]), TripletProblem.SPAN_NOT_IN_TEXT),
    ],
)
def test_what_cannot_be_right_is_wrong_and_not_malformed(answer: Any, problem: Any) -> None:
    verdict = triplet_reward(_text(answer), EXAMPLE, SCHEMA)
    assert verdict == dataclasses.replace(
        verdict, reward=-0.5, format_ok=True, correct=False, predicted=answer, problem=problem
    )
    assert not problem.malformed


def test_white_space_and_escapes_are_json() -> None:
    spaced = json.dumps(RIGHT, indent=2).replace("CRF", "\\u0043RF")
    assert parse_triplets(_text(f"\n {spaced}\n"), SCHEMA, sentence=TEXT).predicted == (
        EXAMPLE.extraction
    )


# --- the reward -----------------------------------------------------------------------------------


def test_the_right_answer_earns_the_most() -> None:
    verdict = triplet_reward(_text(RIGHT), EXAMPLE, SCHEMA)
    assert (verdict.reward, verdict.correct, verdict.problem) == (3.0, True, None)
    assert verdict.figures == {"entity_f1": 100.0, "triplet_f1": 100.0}
    assert triplet_reward(_text(answer_of([], [])), TripletExample("n", TEXT), SCHEMA).reward == 3.0


@pytest.mark.parametrize(
    ("answer", "entity_f1", "triplet_f1"),
    [
        (answer_of([], []), 0, 0),
        (answer_of([["CRF", "Method"], ["NER", "Task"], ["HMM", "Method"]], []), 1, 0),
        (answer_of([["CRF", "Method"]], [["CRF", "Used-For", "NER"]]), 2 / 4, 2 / 3),
        (answer_of([["CRF", "Task"], ["NER", "Task"]], [["NER", "Used-For", "CRF"]]), 2 / 5, 0),
        (
            answer_of([["NER", "Task"]] * 5, [["CRF", "Near", "HMM"], ["HMM", "Near", "CRF"]]),
            2 / 4,
            2 / 3,
        ),
    ],
)
def test_the_reward_is_the_weighted_f1(answer: Any, entity_f1: float, triplet_f1: float) -> None:
    verdict = triplet_reward(_text(answer), EXAMPLE, SCHEMA)
    assert verdict.figures == pytest.approx(
        {"entity_f1": 100 * entity_f1, "triplet_f1": 100 * triplet_f1}
    )
    assert verdict.reward == pytest.approx(-0.5 + 3.5 * (entity_f1 + 2 * triplet_f1) / 3)
    totals = TripletTotals(
        highest=1.0, lowest=0.0, malformed=-1.0, entity_weight=3.0, triplet_weight=1.0
    )
    other = triplet_reward(_text(answer), EXAMPLE, SCHEMA, totals=totals)
    assert other.reward == pytest.approx((3 * entity_f1 + triplet_f1) / 4)
    assert triplet_reward("", EXAMPLE, SCHEMA, totals=totals).reward == -1.0


def test_correct_is_of_the_triplets_alone() -> None:
    untyped = answer_of([], [["CRF", "Used-For", "NER"], ["CRF", "Near", "HMM"]])
    verdict = triplet_reward(_text(untyped), EXAMPLE, SCHEMA)
    assert verdict.correct and verdict.reward == pytest.approx(-0.5 + 3.5 * 2 / 3)
    more = answer_of([], [*map(list, EXAMPLE.extraction.triplets), ["NER", "Used-For", "HMM"]])
    assert not triplet_reward(_text(more), EXAMPLE, SCHEMA).correct


def test_strict_triplets_need_the_types_of_both_ends() -> None:
    gold = EXAMPLE.extraction
    for entities, matched in (
        ([["CRF", "Method"], ["NER", "Task"], ["HMM", "Method"]], 2),
        ([["CRF", "Method"], ["NER", "Task"]], 1),
        ([["CRF", "Method"], ["CRF", "Task"], ["NER", "Task"], ["HMM", "Method"]], 0),
        ([], 0),
    ):
        found = Extraction.from_json(answer_of(entities, [list(t) for t in gold.triplets]))
        compared = compare(gold, found, SCHEMA)
        assert (compared.strict.matched, compared.triplets.matched) == (matched, 2)


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        ({"entity_weight": -1.0}, "entity_weight and triplet_weight are -1.0 and 2.0"),
        ({"entity_weight": 0.0, "triplet_weight": 0.0}, "are 0.0 and 0.0"),
        ({"entity_weight": math.nan}, "are nan and"),
        ({"lowest": 3.0}, "malformed <= lowest < highest, found -3.0, 3.0, 3.0"),
        ({"malformed": 0.0}, "found 0.0, -0.5, 3.0"),
    ],
)
def test_totals_must_make_sense(totals: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TripletTotals(**totals)


# --- completions ----------------------------------------------------------------------------------


def test_a_completion_quotes_what_joins_each_pair() -> None:
    assert triplet_completion(EXAMPLE) == (
        "<think>Cue: helps\n- **Used-For**\nCue: helps NER, as\n- **Near**</think>"
        f"<answer>{json.dumps(RIGHT)}</answer>"
    )
    bare = triplet_completion(EXAMPLE, taught=Taught(thoughts=Thoughts.NONE))
    assert bare == f"<think>-</think><answer>{answer_text(EXAMPLE)}</answer>"
    short = triplet_completion(EXAMPLE, taught=Taught(between_words=1))
    assert "Cue: helps ...\n- **Near**" in short
    given_thought = dataclasses.replace(EXAMPLE, reasoning=" so ")
    assert triplet_completion(given_thought).startswith("<think>so</think><answer>{")
    empty = triplet_completion(TripletExample("n", TEXT))
    assert empty.startswith("<think>No relation of the guide.</think>")


@pytest.mark.parametrize("reasoning", [" ", "an <answer>"])
def test_bad_reasoning_is_refused(reasoning: str) -> None:
    with pytest.raises(DataError, match="reasoning of example p1"):
        triplet_completion(dataclasses.replace(EXAMPLE, reasoning=reasoning))


# --- properties -----------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "why", " ", "\n", "{", "}", "[", "]", ":", ","]
    + ['"entities"', '"triplets"', '"text"', '"type"', '"CRF"', '"Method"', "null", "1e9999", '"']
    + ["<think>why</think><answer>", json.dumps(RIGHT), '{"entities": [], "triplets": []}']
)
WORDS = st.sampled_from(["CRF", "NER", "HMM", "Method", "Task", "Near", "Used-For", "", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["entities", "triplets", "text", "type", "head"]), inner)
    ),
    max_leaves=12,
)


@given(
    st.one_of(
        st.text(st.characters()),
        st.lists(PIECES, max_size=9).map("".join),
        JSON.map(_text),
        st.lists(PIECES, max_size=9).map("".join).map(_text),
    )
)
def test_any_text_gets_a_verdict(text: str) -> None:
    verdict = triplet_reward(text, EXAMPLE, SCHEMA)
    assert verdict.format_ok == (verdict.predicted is not None)
    assert verdict.reward == -3.0 if not verdict.format_ok else -0.5 <= verdict.reward <= 3.0
    assert verdict.format_ok or verdict.problem.malformed
    assert json.dumps(verdict.predicted, ensure_ascii=False).encode()
    assert triplet_reward(f"\n{text} ", EXAMPLE, SCHEMA) == verdict


ANSWERS = st.builds(
    answer_of,
    st.lists(st.tuples(WORDS, WORDS).map(list), max_size=4),
    st.lists(st.tuples(WORDS, WORDS, WORDS).map(list), max_size=4),
)


@given(ANSWERS)
def test_a_well_formed_answer_is_read_as_it_stands(answer: dict[str, Any]) -> None:
    found, problem = parse_extraction(json.dumps(answer))
    if "\\ud800" in json.dumps(answer):
        assert (found, problem) == (None, TripletProblem.NOT_JSON)
    else:
        assert (found, problem) == (Extraction.from_json(answer), None)


TEXTS = st.text(min_size=1).filter(str.strip) | st.lists(
    st.sampled_from(["<think>", "</answer>", "Ann", " ", '"', "\\", "é", "\u2028", "{", "<thi"]),
    min_size=1,
).map("".join).filter(str.strip)


@given(TEXTS, st.data())
def test_gold_comes_back_with_the_highest_reward(text: str, data: Any) -> None:
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, len(text))).filter(
        lambda span: span[0] < span[1]
    )
    entities = tuple(
        Entity(text[start:end], start, end, data.draw(st.sampled_from(SCHEMA.types)))
        for start, end in data.draw(st.lists(spans, max_size=4))
    )
    which = st.integers(0, len(entities) - 1)
    triplets = data.draw(
        st.lists(st.builds(Triplet, which, which, st.sampled_from(SCHEMA.names)), max_size=4)
        if entities
        else st.just([])
    )
    example = TripletExample("x", text, entities, tuple(triplets))
    verdict = triplet_reward(triplet_completion(example), example, SCHEMA)
    assert (verdict.reward, verdict.correct, verdict.problem) == (3.0, True, None)
    assert verdict.predicted == example.answer
    assert json.loads(answer_text(example)) == example.answer


def test_any_order_of_a_directionless_triplet_is_right() -> None:
    turned = answer_of(
        [["HMM", "Method"], ["NER", "Task"], ["CRF", "Method"]],
        [["CRF", "Near", "HMM"], ["CRF", "Used-For", "NER"]],
    )
    assert triplet_reward(_text(turned), EXAMPLE, SCHEMA).reward == 3.0
    wrong = answer_of([], [["NER", "Used-For", "CRF"]])
    assert triplet_reward(_text(wrong), EXAMPLE, SCHEMA).comparison.triplets.matched == 0
