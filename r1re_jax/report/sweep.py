"""The runs of a sweep in one table, and which setting did best, with its interval.

Members that differ in their seed alone are one setting. Where a setting has several, its figure is
their mean with the 95% interval of Student's t over seeds; where it has one, the figure is that of
the run with its evaluation's interval, which is over examples and knows nothing of other seeds.
"""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1re_jax.report.history import Evaluation, History, is_number, read_history
from r1re_jax.report.writers import Value

SEED, DONE = "seed", "done"
# Figures of an evaluation that a sweep may be judged by, and those that are shown of each set.
ACCURACY, TRIPLETS = "avg_at_k", "triplet_f1"
# Title, and the names in metrics.jsonl that it may have.
TRAINING = (
    ("reward", ("reward",)),
    ("kl", ("kl",)),
    ("length", ("completions/mean_length", "length")),
)
SECONDS = ("step_time", "seconds")
# Training figures are means over this share of GRPO's steps, the last ones: one step's are noise.
LAST_SHARE = 0.1
# 97.5% quantiles of Student's t with 1, 2, … degrees of freedom; with more the last one, which is
# a little too wide.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A member of a sweep, as who ran it knows it.

    Attributes:
        name: of the member.
        overrides: value by dotted key.
        workdir: of the run; it may be missing.
        state: what became of it; only who is DONE is compared with others.
        steps: how many it has when it is done.
    """

    name: str
    overrides: Mapping[str, Any]
    workdir: pathlib.Path
    state: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: the figure.
        low: lower end of the 95% interval; the figure itself where none is known.
        high: upper end.
        seeds: how many runs it is the mean of.
    """

    value: float
    low: float
    high: float
    seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one evaluation set says of a run.

    Attributes:
        final: the last evaluation after step 0.
        best: the one with the best figure.
        step: of the best.
    """

    final: Estimate
    best: Estimate
    step: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run in the table.

    Attributes:
        entry: whose.
        step: its last step that metrics.jsonl knows.
        sets: by set, then by figure; what is not known is missing.
        training: reward, KL and length near the end.
        seconds: that its steps took; evaluations and starts are not counted.
    """

    entry: Entry
    step: int
    sets: Mapping[str, Mapping[str, Scored]]
    training: Mapping[str, float]
    seconds: float | None

    def score(self, name: str) -> Estimate | None:
        """The final figure of `SET/METRIC`; None of a run that is not done."""
        if self.entry.state != DONE:
            return None
        of, _, metric = name.rpartition("/")
        scored = self.sets.get(of, {}).get(metric)
        return scored.final if scored else None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Members that differ in their seed alone.

    Attributes:
        overrides: value by dotted key, the seed left out.
        rows: of the members.
        score: of those that have one; None where none has.
    """

    overrides: Mapping[str, Any]
    rows: tuple[Row, ...]
    score: Estimate | None

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return ", ".join(f"{key}={value}" for key, value in self.overrides.items()) or "the recipe"


def read_row(entry: Entry, *, metrics: Sequence[str] = (ACCURACY, TRIPLETS)) -> Row:
    """Read what a member's work directory says so far.

    Args:
        entry: the member.
        metrics: figures of its evaluations.
    """
    try:
        history = read_history(entry.workdir)
    except FileNotFoundError:  # it has not begun, or was refused before it wrote anything
        return Row(entry=entry, step=0, sets={}, training={}, seconds=None)
    return Row(
        entry=entry,
        step=max((row["step"] for row in history.metrics), default=0),
        sets={name: _scores(history.of_set(name), metrics) for name in history.sets},
        training=_training(history),
        seconds=_seconds(history.metrics),
    )


def settings_of(rows: Sequence[Row], score: str) -> tuple[Setting, ...]:
    """Return rows by setting, in the order in which these first come.

    Args:
        rows: of the members.
        score: `SET/METRIC`.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr(_without_seed(row)), []).append(row)
    return tuple(
        Setting(
            overrides=_without_seed(group[0]),
            rows=tuple(group),
            score=over_seeds([found for row in group if (found := row.score(score)) is not None]),
        )
        for group in groups.values()
    )


def best_of(settings: Sequence[Setting]) -> Setting | None:
    """Return the setting with the highest score, the first of equal ones."""
    scored = [setting for setting in settings if setting.score is not None]
    return max(scored, key=lambda setting: setting.score.value, default=None)


def rivals(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return the other settings whose intervals reach that of the best one."""
    best = best_of(settings)
    return tuple(
        one
        for one in settings
        if one is not best and one.score is not None and one.score.high >= best.score.low
    )


def over_seeds(found: Sequence[Estimate]) -> Estimate | None:
    """Return the figure of a setting from those of its members.

    With n > 1 of them: mean ± t(n-1) · s / √n, s with n-1 in the denominator.
    """
    if len(found) < 2:
        return found[0] if found else None
    values = [one.value for one in found]
    t = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    mean, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half, seeds=len(values))


def default_score(rows: Sequence[Row]) -> str:
    """Return what a sweep is judged by unless somebody says; empty where nothing was evaluated.

    In domain comes first, and F1 where there are triplets.
    """
    for row in rows:
        for name, figures in row.sets.items():
            for metric in (TRIPLETS, ACCURACY):
                if metric in figures:
                    return f"{name}/{metric}"
    return ""


def _without_seed(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.entry.overrides.items() if key != SEED}


def _scores(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> dict[str, Scored]:
    """The figures of a set; what was measured before the first step counts for nothing."""
    found = {}
    for metric in metrics:
        known = [e for e in evaluations if e.step and is_number(e.metrics.get(metric))]
        if known:
            best = max(known, key=lambda e: e.metrics[metric])
            found[metric] = Scored(
                final=_estimate(known[-1], metric), best=_estimate(best, metric), step=best.step
            )
    return found


def _estimate(evaluation: Evaluation, metric: str) -> Estimate:
    value = float(evaluation.metrics[metric])
    low, high = (evaluation.interval if metric == ACCURACY else None) or (value, value)
    return Estimate(value=value, low=low, high=high)


def _training(history: History) -> dict[str, float]:
    """Means of the last GRPO steps."""
    found = {}
    for title, names in TRAINING:
        for name in names:
            _, values = history.series(name, phase="grpo")
            if values:
                last = values[-max(1, round(LAST_SHARE * len(values))) :]
                found[title] = statistics.fmean(last)
                break
    return found


def _seconds(metrics: Sequence[Mapping[str, Value]]) -> float | None:
    """Seconds of all steps; a line stands for the steps since the one before it."""
    total, before = 0.0, 0
    for row in metrics:
        known = [row[name] for name in SECONDS if is_number(row.get(name))]
        total += known[0] * (row["step"] - before) if known else 0.0
        before = row["step"]
    return total or None
