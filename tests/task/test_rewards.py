"""The rule: every malformed case by its code, every other one by its label, the totals."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.task.relations import Example, Mention, Relation, Schema
from r1re_jax.task.rewards import (
    Parsed,
    Problem,
    RewardPart,
    RewardTotals,
    Verdict,
    overlong_penalty,
    parse_completion,
    relation_reward,
    reward_part,
)

SCHEMA = Schema((Relation("Cause-Effect"), Relation("merged_with", directed=False)), "Other")
EXAMPLE = Example("1", "a b", Mention("a", 0, 1), Mention("b", 2, 3), "Cause-Effect(e1,e2)")


def _answer(label: str) -> str:
    return f"<think>why</think><answer>{label}</answer>"


def test_the_three_totals() -> None:
    right = relation_reward(_answer("Cause-Effect(e1,e2)"), EXAMPLE, SCHEMA)
    assert right == Verdict(3.0, True, True, "Cause-Effect(e1,e2)", None)
    wrong = relation_reward(_answer("Cause-Effect(e2,e1)"), EXAMPLE, SCHEMA)
    assert wrong == Verdict(-0.5, True, False, "Cause-Effect(e2,e1)", None)
    malformed = relation_reward("Cause-Effect(e1,e2)", EXAMPLE, SCHEMA)
    assert malformed == Verdict(-3.0, False, False, None, Problem.NO_THINK)


def test_totals_can_be_set() -> None:
    totals = RewardTotals(correct=1, wrong=0.25, malformed=0)
    texts = [_answer("Cause-Effect(e1,e2)"), _answer("Other"), ""]
    assert [relation_reward(text, EXAMPLE, SCHEMA, totals=totals).reward for text in texts] == [
        1,
        0.25,
        0,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<think>why</think><answer>Other</answer>",
        "\n <think> why\n\nwhy not </think>\n\n\t<answer>\n Other </answer> \n",
        "<think>the tag <b>, &lt; and < stay text</think> <answer>Other</answer>",
        "<think>\u200b.</think><answer>Other</answer>",
    ],
)
def test_right_formats(text: str) -> None:
    assert parse_completion(text, SCHEMA).predicted == "Other"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", Problem.EMPTY),
        (" \n\t ", Problem.EMPTY),
        ("Other", Problem.NO_THINK),
        ("<answer>Other</answer>", Problem.NO_THINK),
        ("why</think><answer>Other</answer>", Problem.NO_THINK),
        ("<THINK>why</THINK><answer>Other</answer>", Problem.NO_THINK),
        ("<think>why", Problem.THINK_NOT_CLOSED),
        ("<think>why<answer>Other</answer>", Problem.THINK_NOT_CLOSED),
        ("<think>a</think><think>b</think><answer>Other</answer>", Problem.THINK_TWICE),
        ("<think>a<think>b</think><answer>Other</answer>", Problem.THINK_TWICE),
        ("<think>a</think></think><answer>Other</answer>", Problem.THINK_TWICE),
        ("<think>why</think>", Problem.NO_ANSWER),
        ("<think>why</think>Other", Problem.NO_ANSWER),
        ("<think>why</think>Other</answer>", Problem.NO_ANSWER),
        ("<think>why</think><answer>Oth", Problem.ANSWER_NOT_CLOSED),
        ("<think>why</think><answer>Other<answer>", Problem.ANSWER_TWICE),
        (
            "<think>why</think><answer>Other</answer><answer>Other</answer>",
            Problem.ANSWER_TWICE,
        ),
        ("<think>an <answer>?</think><answer>Other</answer>", Problem.ANSWER_TWICE),
        ("<think>why</think><answer>Other</answer></answer>", Problem.ANSWER_TWICE),
        ("<answer>Other</answer><think>why</think>", Problem.TAG_ORDER),
        ("<think>why<answer>Other</answer></think>", Problem.TAG_ORDER),
        ("</think>why<think><answer>Other</answer>", Problem.TAG_ORDER),
        ("<think>why</think></answer>Other<answer>", Problem.TAG_ORDER),
        ("Well: <think>why</think><answer>Other</answer>", Problem.TEXT_BEFORE),
        ("<think>why</think> so <answer>Other</answer>", Problem.TEXT_BETWEEN),
        ("<think>why</think><answer>Other</answer>.", Problem.TEXT_AFTER),
        ("<think>why</think><answer>Other</answer> Done", Problem.TEXT_AFTER),
        ("<think></think><answer>Other</answer>", Problem.BLANK_THOUGHTS),
        ("<think> \n </think><answer>Other</answer>", Problem.BLANK_THOUGHTS),
        (_answer(""), Problem.BLANK_ANSWER),
        (_answer("  \n"), Problem.BLANK_ANSWER),
        (_answer("Cause-Effect"), Problem.MISSING_DIRECTION),
        (_answer("none"), Problem.BAD_ANSWER),
        (_answer("other"), Problem.BAD_ANSWER),
        (_answer("Other."), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(e1,e1)"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(e1)"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(E1,E2)"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(a,b)"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect( e1,e2 )"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(e1,\ne2)"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(e1,e2) Other"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(e1,e2), Other"), Problem.BAD_ANSWER),
        (_answer("Cause-Effect(e1,e2)(e1,e2)"), Problem.BAD_ANSWER),
        (_answer("Cause\nEffect(e1,e2)"), Problem.BAD_ANSWER),
        (_answer("(e1,e2)"), Problem.BAD_ANSWER),
        (_answer("a(b)c(e1,e2)"), Problem.BAD_ANSWER),
    ],
)
def test_malformed_completions_have_their_code(text: str, problem: Problem) -> None:
    parsed = parse_completion(text, SCHEMA)
    assert (parsed.predicted, parsed.problem) == (None, problem)
    assert problem.malformed
    assert not parsed.format_ok
    assert relation_reward(text, EXAMPLE, SCHEMA).reward == -3.0


@pytest.mark.parametrize(
    ("label", "predicted"),
    [
        ("Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)"),
        (" Cause-Effect(e2,e1)\n", "Cause-Effect(e2,e1)"),
        ("Cause-Effect(e1, e2)", "Cause-Effect(e1,e2)"),
        ("Cause-Effect(e2  ,   e1)", "Cause-Effect(e2,e1)"),
        ("Other", "Other"),
        ("\tmerged_with ", "merged_with"),
    ],
)
def test_answers_are_made_canonical(label: str, predicted: str) -> None:
    assert parse_completion(_answer(label), SCHEMA) == Parsed(predicted, "why", None)


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("Effect(e1,e2)", Problem.UNKNOWN_RELATION),
        ("cause-effect(e1,e2)", Problem.UNKNOWN_RELATION),
        ("any text at all, even [this](e2,e1)", Problem.UNKNOWN_RELATION),
        ("Cause-Effect (e1,e2)", Problem.UNKNOWN_RELATION),
        ("Other(e1,e2)", Problem.NEEDLESS_DIRECTION),
        ("merged_with(e2, e1)", Problem.NEEDLESS_DIRECTION),
    ],
)
def test_well_formed_answers_outside_the_guide_are_wrong(label: str, problem: Problem) -> None:
    verdict = relation_reward(_answer(label), EXAMPLE, SCHEMA)
    assert verdict == Verdict(-0.5, True, False, None, problem)
    assert not problem.malformed


def test_a_direction_does_not_make_a_directionless_gold_label_right() -> None:
    merged = dataclasses.replace(EXAMPLE, label="merged_with")
    assert relation_reward(_answer("merged_with"), merged, SCHEMA).correct
    assert relation_reward(_answer("merged_with(e1,e2)"), merged, SCHEMA).reward == -0.5


def test_every_accepted_label_is_right() -> None:
    several = dataclasses.replace(EXAMPLE, labels=("Cause-Effect(e1,e2)", "merged_with"))
    assert relation_reward(_answer("merged_with"), several, SCHEMA).reward == 3.0
    assert relation_reward(_answer("Cause-Effect(e1,e2)"), several, SCHEMA).reward == 3.0
    assert relation_reward(_answer("Other"), several, SCHEMA).reward == -0.5


def test_a_schema_without_none_label_has_no_bare_answer() -> None:
    schema = Schema((Relation("R"),))
    assert parse_completion(_answer("Other"), schema).problem is Problem.BAD_ANSWER
    assert parse_completion(_answer("R"), schema).problem is Problem.MISSING_DIRECTION


def test_reasoning_is_kept_where_it_can_be_told() -> None:
    assert parse_completion("<think> a\nb </think>x", SCHEMA).reasoning == "a\nb"
    assert parse_completion(_answer("?"), SCHEMA).reasoning == "why"
    for text in (
        "",
        "<think>a",
        "</think>a<think>",
        "<think> </think>",
        "<think>a</think></think>",
    ):
        assert parse_completion(text, SCHEMA).reasoning is None


def test_codes_are_fixed_strings() -> None:
    assert Problem("think_twice") == "think_twice"
    assert {problem for problem in Problem if not problem.malformed} == {
        "unknown_relation",
        "needless_direction",
    }


PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "Other", "R(e1,e2)", " ", "\n", "why", "(e1"]
    + [*SCHEMA.labels]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=9).map("".join)))
def test_any_text_gets_one_of_three_rewards(text: str) -> None:
    verdict = relation_reward(text, EXAMPLE, SCHEMA)
    assert verdict.reward == (3.0 if verdict.correct else -0.5 if verdict.format_ok else -3.0)
    assert (verdict.predicted is None) == (verdict.problem is not None)
    assert verdict.predicted is None or verdict.predicted in SCHEMA
    assert verdict.format_ok or verdict.problem.malformed
    assert relation_reward(f"\n{text} ", EXAMPLE, SCHEMA) == verdict


NO_TAGS = st.text().filter(lambda text: not any(tag in text for tag in ("think>", "answer>")))


@given(
    st.sampled_from(SCHEMA.labels),
    NO_TAGS.filter(str.strip),
    st.text(" \n\t"),
    st.integers(0, 3),
)
def test_every_label_comes_back(label: str, thoughts: str, space: str, blanks: int) -> None:
    spaced = label.replace(",", " " * blanks + ",")
    text = f"<think>{thoughts}</think>{space}<answer>{space}{spaced}</answer>"
    assert parse_completion(text, SCHEMA) == Parsed(label, thoughts.strip(), None)


@given(st.text().filter(lambda text: text.strip() and not set(text) & set("()\n")))
def test_any_text_without_brackets_may_be_a_relation(name: str) -> None:
    if any(tag in name for tag in ("think>", "answer>")):
        return
    parsed = parse_completion(_answer(f"{name}(e1,e2)"), SCHEMA)
    assert parsed.format_ok


@pytest.mark.parametrize(
    ("tokens", "truncated", "expected"),
    [(1, False, 0), (80, False, 0), (81, False, -0.05), (90, False, -0.5), (100, False, -1)]
    + [(100, True, -1)],
)
def test_the_penalty_grows_within_the_buffer(tokens: int, truncated: bool, expected: float) -> None:
    got = overlong_penalty(tokens, truncated=truncated, limit=100, buffer=20)
    assert got == pytest.approx(expected)


def test_a_buffer_may_be_all_of_the_limit() -> None:
    assert overlong_penalty(1, truncated=False, limit=4, buffer=4) == -0.25


@pytest.mark.parametrize("totals", [(-0.5, 3, -3), (1, 1, 0), (0, -1, 0), (float("nan"), 0, 0)])
def test_a_right_label_must_earn_the_most(totals: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="a right label must earn the most"):
        RewardTotals(**dict(zip(("correct", "wrong", "malformed"), totals, strict=True)))


def test_parts_of_a_reward() -> None:
    wrong = relation_reward(_answer("Cause-Effect(e2,e1)"), EXAMPLE, SCHEMA)
    values = {part.value: reward_part(part, wrong, overlong=-0.5) for part in RewardPart}
    assert values == {"total": -0.5, "format": 1.0, "answer": 0.0, "length": -0.5}
    right = relation_reward(_answer("Cause-Effect(e1,e2)"), EXAMPLE, SCHEMA)
    assert reward_part(RewardPart.ANSWER, right) == 1
    assert reward_part(RewardPart.FORMAT, relation_reward("", EXAMPLE, SCHEMA)) == 0
