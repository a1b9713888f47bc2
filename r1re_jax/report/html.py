"""One self-contained HTML page of a run: figures, curves, confusion and completions to read.

Everything comes from the work directory; what is missing there is named on the page and left out.
Texts of data and policy are escaped by the template, never trusted.
"""

import base64
import dataclasses
import importlib.resources
import json
import os
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath

from r1re_jax.files import absolute, write
from r1re_jax.report.curves import PANELS, save_curves
from r1re_jax.report.history import (
    Evaluation,
    History,
    is_number,
    read_history,
    read_json,
    read_rows,
    section,
)
from r1re_jax.report.summary import COLUMNS, EXTRACTED, columns, figure, headline, summary

# Completions shown of an evaluation, by outcome, and of training.
SHOWN = {"correct": 4, "wrong": 4, "malformed": 2}
SHOWN_TRAINING = 3
# Confusion tables beyond this many labels are unreadable; only the most frequent are shown.
CONFUSION_LABELS = 24
READ_ROWS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion as shown."""

    id: str
    gold: str
    predicted: str
    outcome: str
    text: str
    reward: str
    sentence: str = ""
    advantage: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the confusion table: what it shows and how dark, 0 … 1."""

    count: int
    share: float
    right: bool


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Write report.html and curves/*.png into a work directory from what is there.

    Returns:
        The path of the page, absolute.

    Raises:
        FileNotFoundError: no such folder, or one without anything of a run.
        PlaceError: a bucket that cannot be reached.
    """
    history = read_history(workdir)
    path = absolute(history.workdir) / "report.html"
    pictures = save_curves(history, path.parent / "curves")
    write(path, render(history, pictures))
    return path


def render(history: History, pictures: Mapping[str, epath.Path]) -> str:
    """The page as HTML text; `pictures` are PNG files by panel name."""
    source = importlib.resources.files("r1re_jax.report") / "report.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(source.read_text(encoding="utf-8"))
    finals = [history.of_set(name)[-1] for name in history.sets]
    return template.render(
        title=absolute(history.workdir).name,
        width=len(columns(history)),
        extracts=columns(history) != COLUMNS,
        facts=facts(history),
        headline=headline(history),
        summary=summary(history),
        every=summary(history, milestones=False),
        curves=[
            (panel.title, _data_url(pictures[panel.name].read_bytes()))
            for panel in PANELS
            if panel.name in pictures
        ],
        details=[_detail(evaluation) for evaluation in finals],
        training=_training_completions(history),
        gaps=history.gaps,
    )


def facts(history: History) -> list[tuple[str, str]]:
    """What the run was: from config.json and metrics.jsonl, where they say so."""
    config, found = history.config, []
    model = section(config, "model")
    found.append(("model", model.get("path") or model.get("preset")))
    sft, grpo = section(config, "sft"), section(config, "grpo")
    if sft.get("steps"):
        found.append(("SFT", f"{sft['steps']} steps"))
    if grpo.get("steps"):
        group = f", {grpo['group']} completions a question" if grpo.get("group") else ""
        found.append(("GRPO", f"{grpo['steps']} steps{group}"))
    if history.metrics:
        found.append(("last step", history.metrics[-1]["step"]))
        minutes = _minutes_in_steps(history)
        found.append(("time in steps", f"{minutes:.1f} min" if minutes else None))
    found.append(("seed", (config.get("config") or config).get("seed")))
    found.append(("configuration", str(config["hash"])[:12] if "hash" in config else None))
    versions = config.get("versions")
    if isinstance(versions, Mapping):
        found += [(name, versions[name]) for name in ("r1re_jax", "jax") if name in versions]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _minutes_in_steps(history: History) -> float:
    """Time of all steps; one that was not written down counts like the next that was."""
    steps, seconds = history.series("step_time")
    counts = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    return sum(count * time for count, time in zip(counts, seconds, strict=True)) / 60


def _detail(evaluation: Evaluation) -> dict[str, Any]:
    """Everything shown of the last evaluation of one set."""
    metrics = evaluation.metrics
    return {
        "name": evaluation.name,
        "step": evaluation.step,
        "scores": [
            (title, figure(metrics.get(key), ".1f"))
            for key, title in (("macro_f1", "macro F1"), ("micro_f1", "micro F1"))
            if is_number(metrics.get(key))
        ],
        "extracted": extracted(metrics),
        "relations": per_relation(metrics.get("per_relation")),
        "types": per_relation(metrics.get("per_type")),
        "confusion": confusion(metrics.get("confusion")),
        "completions": evaluation_completions(evaluation),
    }


def extracted(metrics: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """Rows of the table of an extraction: figures of sample 0, mean F1 of all and its interval."""
    rows = []
    for kind, words in EXTRACTED:
        row = metrics.get(kind)
        if isinstance(row, Mapping):
            figures = [f"{_score(row, key):.1f}" for key in ("precision", "recall", "f1")]
            figures += [f"{_score(row, 'n'):,.0f}", f"{_score(row, 'avg_f1'):.1f}"]
            ends = row.get("ci95")
            known = isinstance(ends, list) and all(map(is_number, ends))
            rows.append((words, figures, "–".join(f"{end:.1f}" for end in ends) if known else ""))
    return rows


def per_relation(table: Any) -> list[tuple[str, list[str], float]]:
    """Rows of the per relation table, most frequent first, with F1 in [0, 100] for the bar."""
    if not isinstance(table, Mapping):
        return []
    rows = []
    for name, row in sorted(table.items(), key=lambda item: -_score(item[1], "n")):
        figures = [f"{_score(row, key):.1f}" for key in ("precision", "recall", "f1")]
        rows.append((name, [*figures, f"{_score(row, 'n'):,.0f}"], _score(row, "f1")))
    return rows


def _score(row: Any, key: str) -> float:
    value = row.get(key) if isinstance(row, Mapping) else None
    return float(value) if is_number(value) else 0.0


def confusion(table: Any) -> dict[str, Any] | None:
    """The confusion as a table: gold labels by frequency, the same and other answers as columns."""
    if not isinstance(table, Mapping) or not table:
        return None
    rows = {gold: dict(row) for gold, row in table.items() if isinstance(row, Mapping)}
    gold = sorted(rows, key=lambda label: -sum(rows[label].values()))
    others = {label for row in rows.values() for label in row} - rows.keys()
    extra = sorted(
        others, key=lambda label: (-sum(row.get(label, 0) for row in rows.values()), label)
    )
    shown = gold[:CONFUSION_LABELS]
    columns = shown + extra[: max(1, CONFUSION_LABELS - len(shown))]
    body = []
    for label in shown:
        total = sum(rows[label].values()) or 1
        counts = [rows[label].get(column, 0) for column in columns]
        cells = [
            Cell(count=count, share=count / total, right=column == label)
            for column, count in zip(columns, counts, strict=True)
        ]
        body.append((label, cells, total))
    left_out = len(gold) - len(shown) + len(set(extra) - set(columns))
    return {"columns": columns, "rows": body, "left_out": left_out}


def evaluation_completions(evaluation: Evaluation) -> list[Completion]:
    """Some completions of each outcome: the first of each in file order, so nothing is picked."""
    sentences = read_json(evaluation.folder / "evaluate.json", []).get("sentences", {})
    wanted = dict(SHOWN)
    chosen: list[Completion] = []
    for row in read_rows(evaluation.folder / "predictions.jsonl", limit=READ_ROWS):
        for sample in _samples(row)[:1]:
            completion = _completion(row, sample, sentence=sentences.get(str(row.get("id")), ""))
            if wanted[completion.outcome]:
                wanted[completion.outcome] -= 1
                chosen.append(completion)
        if not any(wanted.values()):
            break
    order = list(SHOWN)
    return sorted(chosen, key=lambda completion: order.index(completion.outcome))


def _training_completions(history: History) -> list[tuple[int, list[Completion]]]:
    """Groups of the first and the last saved training step, to see what learning changed."""
    files = list(dict.fromkeys([*history.completions[:1], *history.completions[-1:]]))
    found = []
    for path in files:
        rows = read_rows(path, limit=SHOWN_TRAINING)
        shown = [_completion(row, sample) for row in rows for sample in _samples(row)[:2]]
        if shown:
            found.append((int(path.stem), shown))
    return found


def _samples(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    samples = row.get("samples")
    return [s for s in samples if isinstance(s, Mapping)] if isinstance(samples, list) else []


def _completion(
    row: Mapping[str, Any], sample: Mapping[str, Any], *, sentence: Any = ""
) -> Completion:
    outcome = "correct" if sample.get("correct") else "wrong"
    return Completion(
        id=str(row.get("id", "")),
        gold=_answer(row.get("gold", "")),
        predicted=_answer(sample.get("predicted") or "no label"),
        outcome=outcome if sample.get("format_ok") else "malformed",
        text=str(sample.get("text", "")),
        reward=figure(sample.get("reward"), "+.1f"),
        sentence=str(row.get("sentence") or sentence or ""),
        advantage=figure(sample.get("advantage"), "+.2f") if "advantage" in sample else "",
    )


def _answer(value: Any) -> str:
    """A label as it stands, an extraction as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
