"""A work directory as a run leaves it, small."""

import json
import pathlib
from typing import Any

import pytest

HOSTILE = "<script>alert(1)</script>"


def _sample(outcome: str, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "predicted": "Cause-Effect(e1,e2)" if outcome == "correct" else None,
        "correct": outcome == "correct",
        "format_ok": outcome != "malformed",
        "reward": {"correct": 3.0, "wrong": -0.5, "malformed": -3.0}[outcome],
        "tokens": 9,
        "truncated": False,
    }


def _evaluation(folder: pathlib.Path, accuracy: float) -> None:
    folder.mkdir(parents=True)
    metrics = {
        "accuracy": accuracy,
        "avg_at_k": accuracy,
        "pass_at_k": min(1.0, accuracy + 0.2),
        "greedy_accuracy": accuracy + 0.01,
        "ci95": [accuracy - 0.05, accuracy + 0.05],
        "format_rate": 0.875,
        "mean_reward": -0.25,
        "macro_f1": 61.25,
        "micro_f1": 63.0,
        "majority_accuracy": 0.25,
        "n": 3,
        "k": 2,
        "protocol": "held out",
        "per_relation": {"Cause-Effect": {"precision": 50.0, "recall": 40.0, "f1": 44.4, "n": 3}},
        "confusion": {"Cause-Effect(e1,e2)": {"Cause-Effect(e1,e2)": 2, "malformed": 1}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [
        {"id": f"ex{i}", "gold": "Cause-Effect(e1,e2)", "samples": [_sample(outcome, text)] * 2}
        for i, (outcome, text) in enumerate(
            [("correct", f"<think>{HOSTILE}</think>"), ("wrong", "w"), ("malformed", "")]
        )
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"asked": {}, "sentences": {"ex0": "The <e1>storm</e1> broke the <e2>mast</e2>."}}
    (folder / "evaluate.json").write_text(json.dumps(asked))


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """Four SFT steps and six of GRPO, two sets evaluated before, between and after."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "seed": 5,
        "model": {"path": "base:miniworld"},
        "sft": {"steps": 4},
        "grpo": {"steps": 6},
    }
    (folder / "config.json").write_text(json.dumps({"config": config, "hash": "0123456789abcdef"}))
    rows = [
        {"step": step, "phase": "sft", "loss": 1 / step, "step_time": 6.0} for step in range(1, 5)
    ]
    rows += [
        {"step": step, "phase": "grpo", "reward": step / 10, "kl": 0.001 * step, "entropy": 0.5}
        for step in range(5, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, accuracy in ((0, 0.2), (4, 0.4), (7, 0.55), (10, 0.7)):
        _evaluation(folder / "eval" / f"{step}-in_domain", accuracy)
        _evaluation(folder / "eval" / f"{step}-ood", accuracy / 2)
    (folder / "completions").mkdir()
    row = {"id": "t1", "gold": "Other", "samples": [_sample("wrong", "hm") | {"advantage": -0.5}]}
    (folder / "completions" / "9.jsonl").write_text(json.dumps(row) + "\n")
    return folder
