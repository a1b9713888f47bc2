"""The official scorer: its shipped example outputs come out byte for byte."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.task.metrics import semeval2010_macro_f1
from r1re_jax.task.readers import packaged_guide
from r1re_jax.task.schema import DataError, Schema
from r1re_jax.task.semeval import (
    Report,
    Score,
    Way,
    check_answers,
    read_answers,
    semeval2010_report,
)

TITLES = {
    Way.DIRECTED: "(2*9+1)-WAY EVALUATION (USING DIRECTIONALITY)>>>:",
    Way.UNDIRECTED: "(9+1)-WAY EVALUATION IGNORING DIRECTIONALITY >>>:",
    Way.OFFICIAL: "(9+1)-WAY EVALUATION TAKING DIRECTIONALITY INTO ACCOUNT -- OFFICIAL >>>:",
}


@pytest.fixture(scope="module")
def schema() -> Schema:
    return packaged_guide("semeval2010_short").schema


def _short(name: str) -> str:
    """A class as the scorer's tables abbreviate it."""
    if name == "Other":
        return "_O_"
    relation, _, direction = name.partition("(")
    initials = "-".join(word[0] for word in relation.split("-"))
    return initials + direction[1:2]


def _row(start: str, cells: list[int], end: str, counts: list[int], way: Way) -> str:
    """A line of the table: cells, then answered, wrong direction, skipped and actual."""
    answered, wrong, skipped, actual = counts
    tail = f" {skipped:4} {actual:4}"
    if way is Way.OFFICIAL:
        tail = f"  {wrong:4}  {skipped:4}   {actual:4}"
    return start + " ".join(f"{cell:4}" for cell in cells) + end + f"{answered:4}" + tail


def _matrix(report: Report) -> list[str]:
    totals: Counter[str] = Counter()
    for row in report.confusion.values():
        totals.update(row)
    extra = sorted(set(totals) - set(report.classes))
    columns = [*report.classes, *extra]
    names = [_short(name) for name in report.classes]
    names += [
        _short(name) if name == "Other" else "*" + _short(name).replace("-", "") for name in extra
    ]
    rule = "      +" + "-" * (5 * len(names)) + "+"
    official = report.way is Way.OFFICIAL
    sums = " -SUM- xDIRx skip  ACTUAL" if official else " -SUM- skip ACTUAL"
    lines = [
        "       " + "".join(f" {name:>4}" for name in names) + " <-- classified as",
        rule + sums,
    ]
    wrong, skipped = report.wrong_direction, report.skipped
    for name, score in report.classes.items():
        row = report.confusion[name]
        counts = [sum(row.values()), wrong[name], skipped[name], score.actual]
        cells = [row.get(column, 0) for column in columns]
        lines.append(_row(f" {_short(name):>4} |", cells, " | ", counts, report.way))
    counts = [sum(totals.values()), sum(wrong.values()), sum(skipped.values()), report.n]
    sums = _row(" -SUM- ", [totals[column] for column in columns], "   ", counts, report.way)
    return [*lines, rule, sums]


def _figures(report: Report) -> list[str]:
    official = report.way is Way.OFFICIAL
    right, n = report.matched, report.n
    as_none = right + report.skipped.get("Other", 0)
    lines = [
        f"Coverage = {report.answered}/{n} = {report.coverage:5.2f}%",
        "Accuracy (calculated for the above confusion matrix) = "
        f"{right}/{report.answered} = {report.accuracy_of_answered:5.2f}%",
        "Accuracy (considering all skipped examples as Wrong) = "
        f"{right}/{n} = {report.accuracy_skipped_wrong:5.2f}%",
        "Accuracy (considering all skipped examples as Other) = "
        f"{as_none}/{n} = {report.accuracy_skipped_none:5.2f}%",
        "",
        "Results for the individual relations:",
    ]
    for name, score in report.classes.items():
        wrong = report.wrong_direction[name]
        below = f"({score.answered - wrong:4} +{wrong:4})" if official else f"{score.answered:4}"
        lines.append(
            f"{'_Other' if name == 'Other' else name:>25} :    "
            f"P = {score.matched:4}/{below} = {score.precision:6.2f}%     "
            f"R = {score.matched:4}/{score.actual:4} = {score.recall:6.2f}%     "
            f"F1 = {score.f1:6.2f}%"
        )
    micro = report.micro
    return [
        *lines,
        "",
        "Micro-averaged result (excluding Other):",
        f"P = {micro.matched:4}/{micro.answered:4} = {micro.precision:6.2f}%     "
        f"R = {micro.matched:4}/{micro.actual:4} = {micro.recall:6.2f}%     F1 = {micro.f1:6.2f}%",
        "",
        "MACRO-averaged result (excluding Other):",
        f"P = {report.macro_precision:6.2f}%\tR = {report.macro_recall:6.2f}%\t"
        f"F1 = {report.macro_f1:6.2f}%",
    ]


def _official_output(gold: Sequence[str], predicted: Sequence[str | None]) -> str:
    """What the scorer prints, without its warnings."""
    parts: list[str] = []
    for way, title in TITLES.items():
        report = semeval2010_report(gold, predicted, way=way)
        parts += [f"<<< {title}", "", "Confusion matrix:", *_matrix(report), "", *_figures(report)]
        parts += ["", "", ""]
    score = semeval2010_macro_f1(gold, predicted)
    parts.append(
        "<<< The official score is (9+1)-way evaluation with directionality taken into account: "
        f"macro-averaged F1 = {score:.2f}% >>>"
    )
    return "\n".join(parts)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_the_shipped_outputs_come_out_byte_for_byte(
    shared: Path, schema: Schema, number: int
) -> None:
    folder = shared / "data" / "semeval2010" / "scorer_examples"
    key = read_answers(folder / f"answer_key{number}.txt", schema=schema)
    proposed = read_answers(folder / f"proposed_answer{number}.txt", schema=schema)
    assert not check_answers(folder / f"proposed_answer{number}.txt", schema=schema)
    assert set(proposed) <= set(key)
    output = _official_output(list(key.values()), [proposed.get(id) for id in key])
    expected = (folder / f"result_scores{number}.txt").read_text()
    assert output == expected[expected.index("<<<") :].rstrip("\n")


def test_the_format_checker_finds_the_four_faults(shared: Path, schema: Schema) -> None:
    path = shared / "data" / "semeval2010" / "scorer_examples" / "proposed_answer4.txt"
    errors = check_answers(path, schema=schema)
    assert [error.partition(str(path))[2].partition(" ")[0] for error in errors] == [
        ":2:",
        ":3:",
        ":5:",
        ":7:",
    ]
    with pytest.raises(DataError, match=r"(?s)Message-Topc.*\(e1, e2\).*Agency \(e2.*already"):
        read_answers(path, schema=schema)


def test_answer_lines_without_tab_are_faults(tmp_path: Path, schema: Schema) -> None:
    (tmp_path / "a.txt").write_text("1\tOther\r\n2 Other\n\nx\tOther\n")
    errors = check_answers(tmp_path / "a.txt", schema=schema)
    assert ["a.txt:2: expected '<number> TAB" in errors[0], ":4: expected" in errors[1]] == [
        True
    ] * 2
    assert len(errors) == 2


def test_the_gold_labels_score_a_hundred(shared: Path, schema: Schema) -> None:
    path = shared / "data" / "semeval2010" / "scorer_examples" / "answer_key2.txt"
    gold = list(read_answers(path, schema=schema).values())
    assert semeval2010_macro_f1(gold, gold) == 100.0
    assert semeval2010_report(gold, gold).accuracy_skipped_wrong == 100.0


def test_skipped_examples_lower_recall_only() -> None:
    gold = ["A(e1,e2)"] * 4 + ["Other"]
    score = semeval2010_report(gold, ["A(e1,e2)", None, None, None, None]).classes["A"]
    assert (score.precision, score.recall) == (100.0, 25.0)
    assert semeval2010_macro_f1(gold, [None] * 5) == 0.0
    assert semeval2010_report(gold, [None] * 5).accuracy_of_answered == 0.0


def test_a_wrong_direction_counts_against_precision_and_recall() -> None:
    gold = ["A(e1,e2)", "A(e1,e2)", "B(e1,e2)"]
    report = semeval2010_report(gold, ["A(e2,e1)", "A(e1,e2)", "B(e1,e2)"])
    assert report.classes["A"] == Score(matched=1, answered=2, actual=2)
    assert report.macro_f1 == 75.0
    undirected = semeval2010_report(gold, ["A(e2,e1)", "A(e1,e2)", "B(e1,e2)"], way="undirected")
    assert undirected.macro_f1 == 100.0


def test_answers_outside_gold_are_no_class_of_their_own() -> None:
    gold = ["A(e1,e2)", "Other"]
    report = semeval2010_report(gold, ["Z(e1,e2)", "Z(e2,e1)"])
    assert list(report.classes) == ["A", "Other"]
    assert report.micro == Score(matched=0, answered=0, actual=1)


def test_other_schemas_are_scored_alike() -> None:
    gold, predicted = ["merged", "none", "R(e1,e2)"], ["merged", "merged", "R(e1,e2)"]
    report = semeval2010_report(gold, predicted, none="none")
    assert report.classes["merged"] == Score(matched=1, answered=2, actual=1)
    assert math.isclose(report.macro_f1, (200 / 3 + 100) / 2)
    without = semeval2010_report(gold, predicted, none=None)
    assert math.isclose(without.macro_f1, (200 / 3 + 100 + 0) / 3)
    assert without.accuracy_skipped_none == without.accuracy_skipped_wrong


def test_gold_of_other_alone_has_no_score() -> None:
    assert semeval2010_macro_f1(["Other"], ["Other"]) == 0.0


def test_lists_must_fit() -> None:
    with pytest.raises(ValueError, match="found 1 and 2"):
        semeval2010_macro_f1(["Other", "Other"], ["Other"])
    with pytest.raises(ValueError, match="at least one, found 0 and 0"):
        semeval2010_macro_f1([], [])


LABELS = ["A(e1,e2)", "A(e2,e1)", "B(e1,e2)", "B(e2,e1)", "C(e1,e2)", "Other"]


def _naive_macro_f1(gold: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Straight from the words: per relation in gold, right iff relation and direction agree."""
    scores = []
    for relation in sorted({label[0] for label in gold} - {"O"}):
        pairs = list(zip(gold, predicted, strict=True))
        right = sum(label == answer and label[0] == relation for label, answer in pairs)
        answered = sum(answer is not None and answer[0] == relation for _, answer in pairs)
        actual = sum(label[0] == relation for label in gold)
        precision, recall = right / answered if answered else 0.0, right / actual
        total = precision + recall
        scores.append(200.0 * precision * recall / total if total else 0.0)
    return sum(scores) / len(scores) if scores else 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from(LABELS[:4] + ["Other"]), st.sampled_from([*LABELS, None])),
        min_size=1,
        max_size=40,
    )
)
def test_the_score_agrees_with_its_definition(pairs: list[tuple[str, str | None]]) -> None:
    gold, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    score = semeval2010_macro_f1(gold, predicted)
    assert math.isclose(score, _naive_macro_f1(gold, predicted), abs_tol=1e-9)
    for way in Way:
        report = semeval2010_report(gold, predicted, way=way)
        assert report.n == len(pairs)
        assert report.answered == sum(answer is not None for answer in predicted)
