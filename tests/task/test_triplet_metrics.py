"""Figures of extractions against loops over plain dicts, and their intervals."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.task.relations import EntityType, Relation, TripletSchema
from r1re_jax.task.triplets.metrics import KINDS, summarise_triplets
from tests.oracles.extraction import counts, figures, things

SCHEMA = TripletSchema(
    (EntityType("A"), EntityType("B")), (Relation("R"), Relation("S", directed=False))
)
DIRECTIONLESS = {"S"}
Answer = dict[str, list[dict[str, str]]]


def _answer(entities: list[str], triplets: list[str]) -> Answer:
    return {
        "entities": [dict(zip(("text", "type"), one, strict=True)) for one in entities],
        "triplets": [dict(zip(("head", "relation", "tail"), one, strict=True)) for one in triplets],
    }


def _rows(pairs: list[tuple[Answer, list[Answer | None]]]) -> list[dict[str, Any]]:
    fixed = {"text": "…", "tokens": 10, "truncated": False}
    return [
        {
            "id": str(number),
            "gold": gold,
            "samples": [
                fixed
                | {
                    "predicted": answer,
                    "correct": _exact(gold, answer),
                    "format_ok": answer is not None,
                    "reward": -3.0 if answer is None else 1.0,
                }
                for answer in answers
            ],
        }
        for number, (gold, answers) in enumerate(pairs)
    ]


def _exact(gold: Answer, answer: Answer | None) -> bool:
    right, said, wanted = counts(gold, answer, "triplets", DIRECTIONLESS)
    return answer is not None and right == said == wanted


def _summarise(pairs: list[tuple[Answer, list[Answer | None]]], **more: Any) -> dict[str, Any]:
    return summarise_triplets(
        _rows(pairs),
        schema=SCHEMA,
        temperature=1.0,
        protocol="p",
        model="m",
        data_sha256="00",
        **more,
    )


TEXT, KNOWN = st.sampled_from("xyz"), st.sampled_from("RS")
TYPES, NAMES = st.sampled_from("ABQ"), st.sampled_from("RSQ")


def _answers(types: st.SearchStrategy[str], names: st.SearchStrategy[str]) -> Any:
    return st.builds(
        _answer,
        st.lists(st.tuples(TEXT, types), max_size=4),
        st.lists(st.tuples(TEXT, names, TEXT), max_size=4),
    )


GOLD, SAID = _answers(st.sampled_from("AB"), KNOWN), st.none() | _answers(TYPES, NAMES)


@given(st.integers(1, 3).flatmap(
    lambda k: st.lists(st.tuples(GOLD, st.lists(SAID, min_size=k, max_size=k)), min_size=1,
                       max_size=5)
))  # fmt: skip
def test_figures_agree_with_the_oracle(pairs: list[tuple[Answer, list[Answer | None]]]) -> None:
    summary = _summarise(pairs)
    samples = len(pairs[0][1])
    for kind, name in zip(KINDS, ("entity", "triplet", "strict_triplet"), strict=True):
        by_sample = [
            figures([(gold, said[k]) for gold, said in pairs], kind, DIRECTIONLESS)
            for k in range(samples)
        ]
        table = summary[kind]
        assert {key: table[key] for key in by_sample[0]} == pytest.approx(by_sample[0])
        average = sum(one["f1"] for one in by_sample) / samples
        assert table["avg_f1"] == summary[f"{name}_f1"] == pytest.approx(average)
        assert -1e-9 <= table["ci95"][0] <= table["ci95"][1] <= 100 + 1e-9
    assert summary["micro_f1"] == summary["triplets"]["f1"]
    exact = [[_exact(gold, answer) for answer in said] for gold, said in pairs]
    assert summary["accuracy"] == pytest.approx(np.mean([row[0] for row in exact]))
    assert summary["avg_at_k"] == pytest.approx(np.mean(exact))
    _check_by_name(pairs, summary)
    assert json.loads(json.dumps(summary)) == summary


def _check_by_name(pairs: list[Any], summary: dict[str, Any]) -> None:
    for kind, place, key in (("triplets", 1, "per_relation"), ("entities", 1, "per_type")):
        expected = {}
        for name in ("R", "S", "A", "B"):
            right = said = wanted = 0
            for gold, answers in pairs:
                mine, given = (
                    [one for one in things(of, kind, DIRECTIONLESS) if one[place] == name]
                    for of in (gold, answers[0])
                )
                right += len([one for one in given if one in mine])
                said, wanted = said + len(given), wanted + len(mine)
            if wanted:
                expected[name] = pytest.approx(200 * right / (said + wanted))
        assert {name: row["f1"] for name, row in summary[key].items()} == expected


def test_a_malformed_answer_lowers_recall_only() -> None:
    gold = _answer(["xA", "yB"], ["xRy"])
    summary = _summarise([(gold, [gold, None]), (gold, [None, None])])
    assert summary["triplets"]["precision"] == 100.0
    assert summary["triplets"]["recall"] == 50.0
    assert summary["triplet_f1"] == pytest.approx((200 / 3 + 0) / 2)
    assert summary["format_rate"] == 0.25
    assert (summary["accuracy"], summary["avg_at_k"], summary["pass_at_k"]) == (0.5, 0.25, 0.5)
    assert summary["macro_f1"] == pytest.approx(200 / 3)


def test_nothing_to_find_and_nothing_found_is_right_and_has_no_f1() -> None:
    nothing = _answer([], [])
    summary = _summarise([(nothing, [nothing])])
    assert (summary["accuracy"], summary["triplet_f1"], summary["macro_f1"]) == (1.0, 0.0, 0.0)
    assert summary["per_relation"] == summary["per_type"] == {}


def test_the_interval_is_that_of_resampled_examples() -> None:
    random = np.random.default_rng(0)
    gold = _answer(["xA"], ["xRy", "yRz"])
    said = [_answer(["xA"], ["xRy"] * bool(hit)) for hit in random.integers(0, 2, 150)]
    pairs = [(gold, [one]) for one in said]
    low, high = _summarise(pairs)["triplets"]["ci95"]
    resampled = []
    for _ in range(1000):
        chosen = [pairs[i] for i in random.integers(0, len(pairs), len(pairs))]
        hits = [bool(answer["triplets"]) for _, (answer,) in chosen]
        resampled.append(200 * sum(hits) / (sum(hits) + 2 * len(hits)))
    assert np.quantile(resampled, [0.025, 0.975]) == pytest.approx([low, high], abs=1.5)
    assert low < _summarise(pairs)["triplet_f1"] < high
    assert _summarise(pairs)["triplets"]["ci95"] == [low, high]


def test_the_summary_has_every_figure() -> None:
    gold = _answer(["xA", "yB"], ["xSy"])
    summary = _summarise([(gold, [_answer(["xA"], ["ySx"])] * 2)])
    assert summary["entities"]["f1"] == pytest.approx(200 / 3)
    assert summary["triplets"]["f1"] == 100.0
    assert summary["strict_triplets"]["f1"] == 0.0
    assert math.isclose(summary["mean_reward"], 1.0)
    assert set(summary) == {
        *("accuracy", "avg_at_k", "pass_at_k", "ci95", "format_rate", "mean_reward", "mean_tokens"),
        *("truncated_rate", "n", "k", "temperature", "protocol", "model", "data_sha256"),
        *("entity_f1", "triplet_f1", "strict_triplet_f1", "macro_f1", "micro_f1"),
        *("entities", "triplets", "strict_triplets", "per_relation", "per_type"),
    }


def test_rows_are_needed() -> None:
    with pytest.raises(ValueError, match="found 0 examples"):
        _summarise([])
