"""Avg@k, Pass@k, bootstrap and the figures of metrics.json."""

import itertools
import json
import math

import numpy as np
import pytest

from r1re_jax.task import metrics
from r1re_jax.task.relations import Relation, Schema

SCHEMA = Schema((Relation("A"), Relation("B")), "Other")


def _sample(predicted: str | None, gold: str, **more: object) -> dict[str, object]:
    correct = predicted == gold
    reward = 3.0 if correct else -3.0 if predicted is None else -0.5
    fixed = {"text": "…", "tokens": 10, "truncated": predicted is None}
    sample = {"predicted": predicted, "correct": correct, "format_ok": predicted is not None}
    return sample | fixed | {"reward": reward} | more


def _rows(*rows: tuple[str, list[str | None]]) -> list[dict[str, object]]:
    return [
        {"id": str(number), "gold": gold, "samples": [_sample(answer, gold) for answer in answers]}
        for number, (gold, answers) in enumerate(rows)
    ]


def _summarise(rows: list[dict[str, object]]) -> dict[str, object]:
    return metrics.summarise(
        rows, schema=SCHEMA, temperature=1.0, protocol="official", model="m", data_sha256="00"
    )


def test_avg_and_pass_at_k() -> None:
    correct = [[True, False, False, False], [True] * 4, [False] * 4]
    assert metrics.avg_at_k(correct) == 5 / 12
    assert metrics.pass_at_k(correct) == 2 / 3
    assert math.isclose(metrics.pass_at_k(correct, k=1), metrics.avg_at_k(correct))


def test_pass_at_fewer_is_the_mean_over_subsets() -> None:
    row = [True, True, False, False, False]
    subsets = [any(chosen) for chosen in itertools.combinations(row, 2)]
    assert math.isclose(metrics.pass_at_k([row], k=2), np.mean(subsets))


def test_samples_must_be_there_and_equally_many() -> None:
    with pytest.raises(ValueError, match=r"1 <= k <= 2 samples, found k = 3"):
        metrics.pass_at_k([[True, False]], k=3)
    with pytest.raises(ValueError, match="1 <= k"):
        metrics.pass_at_k([[True]], k=0)
    with pytest.raises(ValueError, match=r"2 examples with \[1, 2\] samples"):
        metrics.avg_at_k([[True], [True, False]])
    with pytest.raises(ValueError, match="0 examples with no samples"):
        metrics.avg_at_k([])
    with pytest.raises(ValueError, match=r"1 examples with \[0\]"):
        metrics.pass_at_k([[]])


def test_confusion_counts_by_label() -> None:
    gold = ["A(e1,e2)", "A(e1,e2)", "A(e1,e2)", "Other"]
    assert metrics.confusion(gold, ["A(e1,e2)", None, "Other", "Other"]) == {
        "A(e1,e2)": {"A(e1,e2)": 1, "Other": 1, "malformed": 1},
        "Other": {"Other": 1},
    }


def test_the_mean_of_the_relations_is_the_macro_score() -> None:
    gold = ["A(e1,e2)", "A(e1,e2)", "B(e2,e1)", "Other"]
    predicted = ["A(e1,e2)", "A(e2,e1)", "B(e2,e1)", "A(e1,e2)"]
    table = metrics.per_relation(gold, predicted, none="Other")
    assert list(table) == ["A", "B", "Other"]
    assert table["A"] == pytest.approx({"precision": 100 / 3, "recall": 50, "f1": 40, "n": 2})
    mean = (table["A"]["f1"] + table["B"]["f1"]) / 2
    assert mean == metrics.semeval2010_macro_f1(gold, predicted)


def test_the_bootstrap_covers_the_mean_and_keeps_to_its_seed() -> None:
    values = np.random.default_rng(0).random(400)
    low, high = metrics.bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    width = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert math.isclose(high - low, width, rel_tol=0.1)
    assert metrics.bootstrap_interval(values, seed=1) == (low, high)
    assert metrics.bootstrap_interval(values, seed=2) != (low, high)
    inner = metrics.bootstrap_interval(values, seed=1, level=0.5)
    assert low < inner[0] < inner[1] < high
    assert metrics.bootstrap_interval([0.5] * 3, draws=10) == (0.5, 0.5)


def test_the_bootstrap_needs_values() -> None:
    with pytest.raises(ValueError, match="found 0 and 10000"):
        metrics.bootstrap_interval([])
    with pytest.raises(ValueError, match="found 1 and 0"):
        metrics.bootstrap_interval([1.0], draws=0)


def test_the_paired_bootstrap_sees_a_gain_and_no_other() -> None:
    random = np.random.default_rng(3)
    before = random.integers(0, 2, 300).astype(float)
    gain = np.where(random.random(300) < 0.2, 1.0, before)
    assert metrics.paired_bootstrap(before, gain) < 0.001
    assert metrics.paired_bootstrap(gain, before) > 0.999
    assert metrics.paired_bootstrap(before, before) == 1.0
    assert metrics.paired_bootstrap(before, gain, draws=99) == 1 / 100
    with pytest.raises(ValueError, match="found 1 and 2"):
        metrics.paired_bootstrap([1.0], [1.0, 0.0])


def test_the_paired_bootstrap_agrees_with_the_normal_approximation() -> None:
    random = np.random.default_rng(5)
    difference = random.normal(0.05, 1.0, 1000)
    z = difference.mean() / (difference.std() / math.sqrt(1000))
    expected = 0.5 * math.erfc(z / math.sqrt(2))
    assert metrics.paired_bootstrap(np.zeros(1000), difference) == pytest.approx(expected, abs=0.02)


def test_the_summary_has_every_figure() -> None:
    rows = _rows(
        ("A(e1,e2)", ["A(e1,e2)", "A(e2,e1)"]),
        ("A(e1,e2)", [None, "A(e1,e2)"]),
        ("B(e2,e1)", ["B(e1,e2)", None]),
        ("Other", ["Other", "Other"]),
    )
    summary = _summarise(rows)
    assert summary | {"ci95": None, "per_relation": None} == {
        "accuracy": 0.5,
        "avg_at_k": 0.5,
        "pass_at_k": 0.75,
        "ci95": None,
        "format_rate": 0.75,
        "macro_f1": pytest.approx((200 / 3 + 0) / 2),
        "micro_f1": pytest.approx(200 * 1 / (2 + 3)),
        "mean_reward": pytest.approx((4 * 3 - 2 * 0.5 - 2 * 3) / 8),
        "mean_tokens": 10.0,
        "truncated_rate": 0.25,
        "n": 4,
        "k": 2,
        "temperature": 1.0,
        "protocol": "official",
        "model": "m",
        "data_sha256": "00",
        "per_relation": None,
        "confusion": {
            "A(e1,e2)": {"A(e1,e2)": 1, "malformed": 1},
            "B(e2,e1)": {"B(e1,e2)": 1},
            "Other": {"Other": 1},
        },
    }
    low, high = summary["ci95"]
    assert 0 <= low < 0.5 < high <= 1
    assert summary["per_relation"]["B"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1}
    assert json.loads(json.dumps(summary)) == summary


def test_a_second_gold_label_counts_where_it_was_given() -> None:
    rows = _rows(("A(e1,e2)", ["B(e1,e2)"]))
    rows[0]["samples"] = [_sample("B(e1,e2)", "A(e1,e2)", correct=True)]
    summary = _summarise(rows)
    assert (summary["accuracy"], summary["macro_f1"]) == (1.0, 100.0)
    assert summary["confusion"] == {"B(e1,e2)": {"B(e1,e2)": 1}}


def test_rows_need_equally_many_samples() -> None:
    with pytest.raises(ValueError, match=r"2 examples with \[1, 2\] samples"):
        _summarise(_rows(("Other", ["Other"]), ("Other", ["Other", None])))
    with pytest.raises(ValueError, match="found 0 examples"):
        _summarise([])
