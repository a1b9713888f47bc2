"""The main job on the embedded default, and the one line of JSON that sums it up."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from rich.console import Console

from r1re_jax.files import absolute
from r1re_jax.policy_files import load_policy, save_policy
from r1re_jax.report.card import exported_step, model_card
from r1re_jax.report.curves import save_curves
from r1re_jax.report.history import Evaluation, History, read_history, read_rows
from r1re_jax.report.html import write_report
from r1re_jax.report.summary import print_summary
from r1re_jax.train.settings import Settings

IN_DOMAIN, OOD = "in_domain", "ood"
SHOWN_COMPLETIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """What a finished quickstart leaves behind; absolute paths.

    Attributes:
        report: HTML page with table, curves and completions.
        curves: PNG files.
        export: Hugging Face folder of the trained policy.
    """

    report: epath.Path
    curves: tuple[epath.Path, ...]
    export: epath.Path


def finish(workdir: epath.Path, *, export: epath.Path) -> Products:
    """Write report, curves and export of a finished run; an export that is there is kept.

    Args:
        workdir: of the run.
        export: folder to write.
    """
    workdir = absolute(workdir)
    history = read_history(workdir)
    curves = save_curves(history, workdir / "curves")
    if not (export / "config.json").is_file():
        step = exported_step(workdir, None)
        policy = load_policy(workdir, step=step)
        save_policy(policy, export, card=model_card(policy, workdir, name=export.name, step=step))
    return Products(
        report=write_report(workdir),
        curves=tuple(curves.values()),
        export=absolute(export),
    )


def stage_steps(settings: Settings) -> dict[str, int]:
    """Return the step at which each row of the result was measured."""
    return {"before_sft": 0, "after_sft": settings.sft.steps, "after_grpo": settings.steps}


def result(
    history: History, *, steps: Mapping[str, int], products: Products, seconds: float
) -> dict[str, Any]:
    """Return the quickstart's last line.

    Args:
        history: of the run.
        steps: row -> step at which it was measured.
        products: what was written.
        seconds: since the command began.

    Raises:
        KeyError: an evaluation that the run did not make.
    """
    found = {(e.step, e.name): e.metrics for e in history.evaluations}
    rows = {name: _row(found[step, IN_DOMAIN], found[step, OOD]) for name, step in steps.items()}
    return {
        "seconds": round(seconds, 1),
        **rows,
        "report": str(products.report),
        "export": str(products.export),
    }


def _row(inside: Mapping[str, Any], outside: Mapping[str, Any]) -> dict[str, float]:
    return {
        "accuracy": inside["avg_at_k"],
        "ood_accuracy": outside["avg_at_k"],
        "format_rate": inside["format_rate"],
        "mean_reward": inside["mean_reward"],
    }


def show(history: History, control: History, console: Console) -> None:
    """Print the tables of the run and of its supervised counterpart, and some completions."""
    console.rule("SFT, then GRPO")
    print_summary(history, console)
    console.rule("SFT alone, on as many examples")
    print_summary(control, console)
    last = max(evaluation.step for evaluation in history.evaluations)
    for name in (IN_DOMAIN, OOD):
        of_set = [e for e in history.of_set(name) if e.step == last]
        for evaluation in of_set:
            console.rule(f"completions, {name}")
            _show_completions(evaluation, console.print)


def _show_completions(evaluation: Evaluation, write: Callable[..., None]) -> None:
    rows = read_rows(evaluation.folder / "predictions.jsonl", limit=SHOWN_COMPLETIONS)
    for row in rows:
        sample = row["samples"][0]
        mark = "right" if sample["correct"] else "wrong"
        write(f"{row['id']}: {sample['text']}", markup=False, highlight=False)
        write(f"    {mark}, gold {row['gold']}, reward {sample['reward']:+g}", markup=False)
