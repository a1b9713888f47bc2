"""A run in one table: what the policy was and how good it was on every set."""

import itertools
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from r1re_jax.report.history import Evaluation, History, is_number, section

# Key in metrics.json, column title, format. `ci95` is shown with avg_at_k.
COLUMNS = (
    ("avg_at_k", "Avg@{k}", ".1%"),
    ("greedy_accuracy", "Greedy", ".1%"),
    ("pass_at_k", "Pass@{k}", ".1%"),
    ("format_rate", "Format", ".1%"),
    ("mean_reward", "Reward", "+.2f"),
)
# Of 100; shown where the task is the extraction of triplets.
TRIPLET_COLUMNS = (
    ("entity_f1", "Entity F1", ".1f"),
    ("triplet_f1", "Triplet F1", ".1f"),
    ("strict_triplet_f1", "Strict F1", ".1f"),
)
# Tables of an extraction's metrics.json and what they are of.
EXTRACTED = (
    ("entities", "entities"),
    ("triplets", "triplets"),
    ("strict_triplets", "triplets with the types of both ends"),
)


def columns(history: History) -> tuple[tuple[str, str, str], ...]:
    """The columns of a run's tables; those of triplets where an evaluation has any."""
    extracted = any("triplet_f1" in evaluation.metrics for evaluation in history.evaluations)
    return COLUMNS + TRIPLET_COLUMNS if extracted else COLUMNS


def stages(history: History) -> dict[int, str]:
    """The steps worth a row, with what the policy was then, ascending.

    Before training, after the supervised warm start, after GRPO (or as far as it has come).
    """
    steps = sorted({evaluation.step for evaluation in history.evaluations})
    if not steps:
        return {}
    warm, last = history.sft_steps, steps[-1]
    names: dict[int, str] = {}
    if steps[0] == 0:
        names[0] = "before SFT" if warm else "before GRPO"
    if 0 < warm <= last and warm in steps:
        names[warm] = "after SFT"
    if last > warm:
        planned = section(history.config, "grpo").get("steps")
        done = not is_number(planned) or last >= warm + planned
        names[last] = "after GRPO" if done else f"GRPO so far (step {last})"
    elif last not in names:
        names[last] = f"SFT so far (step {last})"
    return names


def summary(history: History, *, milestones: bool = True) -> dict[str, Any]:
    """The table of stages (or of every evaluated step): one group of columns a set."""
    named, shown = stages(history), columns(history)
    steps = sorted({evaluation.step for evaluation in history.evaluations})
    rows = []
    for step in named if milestones else steps:
        found = {e.name: e for e in history.evaluations if e.step == step}
        cells = [_cells(found.get(name), shown) for name in history.sets]
        rows.append((named.get(step, ""), step, list(itertools.chain(*cells))))
    return {"sets": [_set_head(history, name) for name in history.sets], "rows": rows}


def _set_head(history: History, name: str) -> dict[str, Any]:
    metrics = history.of_set(name)[-1].metrics
    k = metrics.get("k", "k")
    notes = [f"{metrics['n']:,} examples"] if is_number(metrics.get("n")) else []
    if is_number(metrics.get("majority_accuracy")):
        notes.append(f"majority label {metrics['majority_accuracy']:.1%}")
    if metrics.get("protocol"):
        notes.append(str(metrics["protocol"]))
    return {
        "name": name,
        "note": ", ".join(notes),
        "columns": [title.format(k=k) for _, title, _ in columns(history)],
    }


def _cells(
    evaluation: Evaluation | None, shown_columns: tuple[tuple[str, str, str], ...]
) -> list[tuple[str, str]]:
    """Shown value and interval of each column."""
    metrics = evaluation.metrics if evaluation else {}
    interval = evaluation.interval if evaluation else None
    shown = "–".join(f"{100 * end:.1f}" for end in interval or ())
    return [
        (figure(metrics.get(key), style), shown if key == "avg_at_k" else "")
        for key, _, style in shown_columns
    ]


def figure(value: Any, style: str) -> str:
    """A number in its format, with a dash for what is not known and a true minus sign."""
    return format(value, style).replace("-", "−") if is_number(value) else "–"


def headline(history: History) -> list[dict[str, str]]:
    """For each set the last stage's accuracy and how far it is from the first stage of GRPO."""
    named = list(stages(history))
    tiles = []
    for name in history.sets:
        by_step = {e.step: e.metrics.get("avg_at_k") for e in history.of_set(name)}
        values = [(step, by_step.get(step)) for step in named if is_number(by_step.get(step))]
        if not values:
            continue
        start = [value for step, value in values[:-1] if step <= history.sft_steps]
        change = (
            f"{100 * (values[-1][1] - start[-1]):+.1f} points over the start of GRPO"
            if start
            else ""
        )
        tiles.append(
            {
                "name": name,
                "value": figure(values[-1][1], ".1%"),
                "note": change.replace("-", "−"),
            }
        )
    return tiles


def print_summary(history: History, console: Console) -> None:
    """Print the table of stages, a line for each stage and set."""
    table = Table(title_justify="left")
    rows, width = summary(history), len(columns(history))
    for title in ("policy", "set", *(rows["sets"][0]["columns"] if rows["sets"] else ())):
        table.add_column(title, justify="left" if title in ("policy", "set") else "right")
    for stage, step, cells in rows["rows"]:
        for number, head in enumerate(rows["sets"]):
            shown = cells[number * width : (number + 1) * width]
            values = [f"{value} ({ends})" if ends else value for value, ends in shown]
            first = f"{stage}, step {step}" if number == 0 else ""
            table.add_row(first, head["name"], *values, end_section=head is rows["sets"][-1])
    console.print(table)


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print the figures of one evaluation, those of what was extracted and of each relation."""
    k = metrics["k"]
    low, high = metrics["ci95"]
    figures = Table(show_header=False)
    figures.add_column(justify="left")
    figures.add_column(justify="right")
    figures.add_row("examples, samples of each", f"{metrics['n']:,}, {k}")
    figures.add_row("accuracy, sample 0", figure(metrics["accuracy"], ".1%"))
    for key, title, style in COLUMNS + TRIPLET_COLUMNS:
        ends = f" ({100 * low:.1f}–{100 * high:.1f})" if key == "avg_at_k" else ""
        if is_number(metrics.get(key)):
            figures.add_row(title.format(k=k), figure(metrics[key], style) + ends)
    figures.add_row("majority label", figure(metrics["majority_accuracy"], ".1%"))
    figures.add_row("macro F1, micro F1", f"{metrics['macro_f1']:.1f}, {metrics['micro_f1']:.1f}")
    console.print(figures)
    extracted = {words: metrics[kind] for kind, words in EXTRACTED if kind in metrics}
    if extracted:
        console.print(_scores("sample 0", extracted))
    console.print(_scores("relation", metrics["per_relation"]))
    if "per_type" in metrics:
        console.print(_scores("entity type", metrics["per_type"]))


def _scores(title: str, scores: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of precision, recall, F1 and n by name."""
    table = Table(title)
    for column in ("precision", "recall", "F1", "n"):
        table.add_column(column, justify="right")
    for name, row in scores.items():
        shown = [f"{row[key]:.1f}" for key in ("precision", "recall", "f1")]
        table.add_row(name, *shown, f"{row['n']:,}")
    return table
