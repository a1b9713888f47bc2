"""A sweep's table as CSV and as Markdown."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from r1re_jax.report.history import is_number, is_out_of_domain
from r1re_jax.report.progress import clock
from r1re_jax.report.summary import figure
from r1re_jax.report.sweep import (
    SEED,
    TRAINING,
    Estimate,
    Row,
    Scored,
    Setting,
    best_of,
    rivals,
    settings_of,
)

# Columns that differ between equal sweeps.
TIMED = ("seconds", "time")
# Figures that are fractions; the others are of 100 or have a scale of their own.
FRACTIONS = ("accuracy", "avg_at_k", "pass_at_k", "greedy_accuracy", "format_rate")
TRAINING_STYLES = {"reward": "+.2f", "kl": ".4f", "length": ".1f"}


def as_csv(rows: Sequence[Row]) -> str:
    """One line a member; numbers with six digits, what is not known empty."""
    keys, figures = _keys(rows), _figures(rows)
    buffer = io.StringIO()
    head = ["member", *keys, "state", "step", "steps"]
    for name, metric in figures:
        at = f"{name}/{metric}"
        head += [at, f"{at}/low", f"{at}/high", f"{at}/best", f"{at}/best_step"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*head, *(title for title, _ in TRAINING), "seconds"])
    for row in rows:
        cells: list[Any] = [row.entry.name, *(row.entry.overrides.get(key, "") for key in keys)]
        cells += [row.entry.state, row.step, row.entry.steps]
        for name, metric in figures:
            cells += _scored_cells(row.sets.get(name, {}).get(metric))
        cells += [_number(row.training.get(title)) for title, _ in TRAINING]
        writer.writerow([*cells, _number(row.seconds)])
    return buffer.getvalue()


def as_markdown(rows: Sequence[Row], *, title: str, score: str) -> str:
    """The best setting, a table of settings where members differ in seeds, a table of members.

    Args:
        rows: of the members.
        title: of the page.
        score: `SET/METRIC` that the sweep is judged by; empty where nothing was evaluated.
    """
    settings = settings_of(rows, score)
    parts = [f"# {title}", _verdict(settings, score)]
    if any(len(setting.rows) > 1 for setting in settings):
        parts += ["## Settings", _settings_table(settings, score)]
    parts += ["## Runs", _runs_table(rows), _note(rows)]
    return "\n\n".join(parts) + "\n"


def shown(estimate: Estimate | None, metric: str) -> str:
    """A figure with its interval, per cent where it is a fraction."""
    if estimate is None:
        return "–"
    style = ".1%" if metric in FRACTIONS else ".3f" if metric == "mean_reward" else ".1f"
    value = figure(estimate.value, style)
    if estimate.low == estimate.value == estimate.high:
        return value
    return f"{value} ({figure(estimate.low, style)} to {figure(estimate.high, style)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _verdict(settings: Sequence[Setting], score: str) -> str:
    best = best_of(settings)
    if best is None:
        return "No member is done and evaluated yet."
    metric = score.rpartition("/")[-1]
    seeds = best.score.seeds
    of = f"mean of {seeds} seeds" if seeds > 1 else "one run, interval over examples"
    text = f"Best by {score}: **{best.name}**, {shown(best.score, metric)}, {of}."
    near = rivals(settings)
    if near:
        text += " Not told from it, since the intervals overlap: " + "; ".join(
            one.name for one in near
        )
        text += "."
    return text


def _settings_table(settings: Sequence[Setting], score: str) -> str:
    best, metric = best_of(settings), score.rpartition("/")[-1]
    lines = []
    for one in settings:
        name = f"**{one.name}**" if one is best else one.name
        counted = one.score.seeds if one.score else 0
        lines.append([name, f"{counted} of {len(one.rows)}", shown(one.score, metric)])
    return table(["setting", "seeds", score or "score"], lines)


def _runs_table(rows: Sequence[Row]) -> str:
    keys, figures = _keys(rows), _figures(rows)
    head = [*keys] or ["member"]
    for name, metric in figures:
        head += [f"{name}/{metric}", "best, at step"]
    head += [*(title for title, _ in TRAINING), "state", "time"]
    lines = []
    for row in rows:
        cells = [str(row.entry.overrides.get(key, "–")) for key in keys] or [row.entry.name]
        for name, metric in figures:
            scored = row.sets.get(name, {}).get(metric)
            cells.append(shown(scored.final if scored else None, metric))
            cells.append(f"{shown(_bare(scored), metric)}, {scored.step}" if scored else "–")
        cells += [figure(row.training.get(title), TRAINING_STYLES[title]) for title, _ in TRAINING]
        time = clock(row.seconds) if row.seconds is not None else "–"
        lines.append([*cells, row.entry.state, time])
    return table(head, lines)


def _note(rows: Sequence[Row]) -> str:
    seeded = "seed" in _keys(rows)
    return (
        "In brackets: the 95% interval over the examples of the set"
        + (", above over seeds (Student's t)" if seeded else "")
        + ". Reward, KL and length are of training, over the last tenth of GRPO's steps; time is"
        " that of the steps."
    )


def _bare(scored: Scored) -> Estimate:
    value = scored.best.value
    return Estimate(value=value, low=value, high=value)


def _keys(rows: Sequence[Row]) -> list[str]:
    """Overridden keys in the order in which they come, the seed last."""
    found = {key: None for row in rows for key in row.entry.overrides}
    return [*(key for key in found if key != SEED), *([SEED] if SEED in found else [])]


def _figures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Sets and figures that any member has, sets in domain first."""
    found = {(name, metric): None for row in rows for name in row.sets for metric in row.sets[name]}
    return sorted(found, key=lambda pair: (is_out_of_domain(pair[0]), pair))


def _scored_cells(scored: Scored | None) -> list[str]:
    if scored is None:
        return [""] * 5
    final = scored.final
    numbers = [_number(value) for value in (final.value, final.low, final.high, scored.best.value)]
    return [*numbers, str(scored.step)]


def _number(value: Any) -> str:
    return format(value, ".6g") if is_number(value) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
