"""The table and the picture of a sweep, from work directories as runs leave them."""

import csv
import dataclasses
import io
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.image import imread

from r1re_jax.report.sweep import (
    ACCURACY,
    DONE,
    T_QUANTILES,
    Entry,
    Estimate,
    best_of,
    default_score,
    over_seeds,
    read_row,
    rivals,
    settings_of,
)
from r1re_jax.report.sweep_files import write_sweep
from r1re_jax.report.sweep_lines import SweepLines
from r1re_jax.report.sweep_table import as_csv, as_markdown

SCORE = "in_domain/avg_at_k"


def member(
    folder: pathlib.Path, accuracy: float | None, state: str = DONE, **overrides: Any
) -> Entry:
    """A member with two SFT steps and twenty of GRPO; None was never evaluated."""
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    name = ",".join(f"{key}={value}" for key, value in overrides.items())
    workdir = folder / name
    entry = Entry(name=name, overrides=overrides, workdir=workdir, state=state, steps=22)
    if accuracy is None:
        return entry
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"config": {"sft": {"steps": 2}}}))
    rows: list[Mapping[str, Any]] = [{"step": s, "phase": "sft", "seconds": 1.0} for s in (1, 2)]
    rows += [
        {"step": s, "phase": "grpo", "reward": s / 10, "kl": 0.001, "length": 20 + s, "seconds": 2}
        for s in range(3, 23)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, value in ((0, 0.9), (2, accuracy - 0.2), (12, accuracy + 0.1), (22, accuracy)):
        for name, factor in (("in_domain", 1.0), ("ood", 0.5)):
            place = workdir / "eval" / f"{step}-{name}"
            place.mkdir(parents=True)
            figures = {"avg_at_k": value * factor, "ci95": [value * factor - 0.05, value * factor]}
            (place / "metrics.json").write_text(json.dumps(figures))
    return entry


def test_a_row_has_the_final_and_the_best_figures_after_step_0(tmp_path: pathlib.Path) -> None:
    row = read_row(member(tmp_path, 0.6, seed=1))
    assert list(row.sets) == ["in_domain", "ood"]
    scored = row.sets["in_domain"][ACCURACY]
    assert scored.final == Estimate(value=0.6, low=0.6 - 0.05, high=0.6)
    assert (scored.best.value, scored.step) == (pytest.approx(0.7), 12), "0.9 was before training"
    assert row.training == {
        "reward": pytest.approx(2.15),  # the mean of steps 21 and 22, a tenth of twenty
        "kl": pytest.approx(0.001),
        "length": pytest.approx(41.5),
    }
    assert row.seconds == 42.0
    assert row.step == 22


def test_steps_that_were_not_written_down_count_in_the_time(tmp_path: pathlib.Path) -> None:
    entry = member(tmp_path, 0.6, seed=1)
    rows = [{"step": step, "step_time": 3.0} for step in (5, 10)]
    (entry.workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_row(entry).seconds == 30.0


@pytest.mark.parametrize("count", [2, 3, 5, 21, 22, 40])
def test_the_interval_over_seeds_is_students(count: int) -> None:
    values = np.random.default_rng(count).normal(0.5, 0.1, count)
    found = over_seeds([Estimate(value=v, low=v - 1, high=v + 1) for v in values.tolist()])
    low, high = scipy.stats.t.interval(
        0.95, count - 1, loc=values.mean(), scale=scipy.stats.sem(values)
    )
    assert found.value == pytest.approx(values.mean())
    # Beyond the table the interval is a little wider.
    slack = 0.0 if count - 1 <= len(T_QUANTILES) else 0.01
    assert found.low == pytest.approx(low, abs=1e-3 * (high - low) + slack)
    assert found.high == pytest.approx(high, abs=1e-3 * (high - low) + slack)
    assert found.high - found.low >= (high - low) * 0.999
    assert found.seeds == count


def test_seeds_are_one_setting_and_the_best_is_the_best_mean(tmp_path: pathlib.Path) -> None:
    figures = {0.0: (0.50, 0.52, 0.54), 0.1: (0.30, 0.85, 0.41), 1.0: (0.20, 0.21, 0.22)}
    entries = [
        member(tmp_path, accuracy, grpo__kl_coefficient=value, seed=seed)
        for value, runs in figures.items()
        for seed, accuracy in enumerate(runs)
    ]
    rows = [read_row(entry) for entry in entries]
    assert default_score(rows) == SCORE
    settings = settings_of(rows, SCORE)
    assert [one.name for one in settings] == [
        f"grpo.kl_coefficient={value}" for value in (0.0, 0.1, 1.0)
    ]
    best = best_of(settings)
    # 0.0 and 0.1 have equal means; the first of them is taken.
    assert best is settings[0] and best.score.value == pytest.approx(0.52)
    assert [one.name for one in rivals(settings)] == ["grpo.kl_coefficient=0.1"]
    page = as_markdown(rows, title="Sweep kl", score=SCORE)
    assert "Best by in_domain/avg_at_k: **grpo.kl_coefficient=0.0**, 52.0%" in page
    assert "mean of 3 seeds" in page
    assert "the intervals overlap: grpo.kl_coefficient=0.1." in page
    assert "| **grpo.kl_coefficient=0.0** | 3 of 3 | 52.0% (" in page
    assert page.count("| done |") == 9


def test_without_seeds_the_interval_is_the_evaluations(tmp_path: pathlib.Path) -> None:
    rows = [read_row(member(tmp_path, 0.3 * n, grpo__group=8 * n)) for n in (1, 2)]
    (one, other) = settings_of(rows, SCORE)
    assert best_of([one, other]) is other
    assert other.score == Estimate(value=0.6, low=0.6 - 0.05, high=0.6)
    page = as_markdown(rows, title="Sweep", score=SCORE)
    assert "## Settings" not in page and "one run, interval over examples" in page
    assert "| 16 | 60.0% (55.0% to 60.0%) | 70.0%, 12 | 30.0% (25.0% to 30.0%) |" in page


def test_who_is_not_done_is_shown_and_not_compared(tmp_path: pathlib.Path) -> None:
    entries = [
        member(tmp_path, 0.3, grpo__group=8),
        member(tmp_path, 0.9, "failed (1)", grpo__group=16),
        member(tmp_path, None, "not begun", grpo__group=32),
    ]
    rows = [read_row(entry) for entry in entries]
    assert best_of(settings_of(rows, SCORE)).overrides == {"grpo.group": 8}
    page = as_markdown(rows, title="Sweep", score=SCORE)
    assert "| failed (1) |" in page and "| not begun |" in page
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["state"] for line in lines] == ["done", "failed (1)", "not begun"]
    assert lines[1]["in_domain/avg_at_k"] == "0.9"
    assert lines[2]["in_domain/avg_at_k"] == lines[2]["reward"] == lines[2]["seconds"] == ""


def test_members_of_other_keys_stand_in_one_table(tmp_path: pathlib.Path) -> None:
    entries = [member(tmp_path, 0.3, sft__steps=8), member(tmp_path, 0.4, grpo__loss="gspo|x")]
    rows = [read_row(entry) for entry in entries]
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [(line["sft.steps"], line["grpo.loss"]) for line in lines] == [("8", ""), ("", "gspo|x")]
    page = as_markdown(rows, title="Sweep", score=SCORE)
    assert "gspo\\|x" in page
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in page.splitlines() if line[:1] == "|"}
    assert len(widths) == 1


def test_the_files_are_whole_and_those_of_equal_runs_are_equal(tmp_path: pathlib.Path) -> None:
    entries = [
        member(tmp_path, 0.1 * group / 4 + 0.01 * seed, grpo__group=group, a__b=rate, seed=seed)
        for group, rate in ((4, 1e-5), (8, 1e-4), (16, 1e-5))
        for seed in (0, 1)
    ]
    axes = (("grpo.group",), ("a.b",), ("seed",))
    made = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        write_sweep(folder, entries, axes=axes, title="Sweep")
        assert sorted(path.name for path in folder.iterdir()) == [
            *("sweep.csv", "sweep.md", "sweep.png")
        ]
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1]
    height, width, _ = imread(folder / "sweep.png").shape
    assert width > 1.5 * height, "a panel for each axis, seeds left out"
    write_sweep(folder, entries, axes=axes, title="Sweep", score="ood/avg_at_k")
    assert "Best by ood/avg_at_k" in (folder / "sweep.md").read_text()


def test_before_anything_is_done_there_is_a_table_and_no_picture(tmp_path: pathlib.Path) -> None:
    entries = [member(tmp_path / "runs", None, "not begun", seed=0)]
    write_sweep(tmp_path, entries, axes=(("seed",),), title="Sweep")
    assert "No member is done" in (tmp_path / "sweep.md").read_text()
    assert not (tmp_path / "sweep.png").exists()


def test_lines_are_never_silent_and_show_why_a_member_failed(tmp_path: pathlib.Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Job:
        name: str
        log: pathlib.Path

    clock = [0.0]
    stream = io.StringIO()
    lines = SweepLines(stream, total=3, now=lambda: clock[0])
    lines.begin(todo=2)
    job = Job("a", tmp_path / "train.log")
    lines.began(job)
    job.log.write_text("[sft 1/2]\n[grpo 2/9]  reward +0.10\n")
    spoken = 0.0
    for _ in range(1000):
        clock[0] += 0.1
        before = stream.tell()
        lines.beat([job])
        if stream.tell() > before:
            assert clock[0] - spoken < 20
            spoken = clock[0]
    assert math.isclose(spoken, clock[0], abs_tol=20)
    assert "    a: [grpo 2/9]  reward +0.10\n" in stream.getvalue()
    lines.ended(job, 1, ["run.train: no such file"])
    assert "[sweep 1/3 done, 1 not]" in stream.getvalue()
    assert "    run.train: no such file\n" in stream.getvalue()
    stream.close()
    lines.ended(job, 0, [])  # nobody listens any more
