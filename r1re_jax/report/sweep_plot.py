"""A sweep as a picture: the score against each swept value, the best setting marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from r1re_jax.report.curves import COLOURS, DPI, FAINT, INK, quiet
from r1re_jax.report.sweep import SEED, Setting, best_of
from r1re_jax.report.sweep_table import FRACTIONS, shown

PANEL_INCHES = (4.2, 3.4)
# Points of one value stand beside each other within this share of the way to the next.
SPREAD = 0.5


def draw_sweep(
    settings: Sequence[Setting], axes: Sequence[tuple[str, ...]], *, score: str
) -> Figure | None:
    """Return one panel for each axis of a sweep; None where no setting has a score.

    Values stand in the order in which the sweep gives them, at equal distances: they may be words,
    and numbers may be powers of ten with a zero before them.

    Args:
        settings: of the sweep.
        axes: keys that vary, those of a zip together; seeds are left out.
        score: `SET/METRIC`.
    """
    best = best_of(settings)
    if best is None:
        return None
    panels = [axis for axis in axes if axis != (SEED,)] or [()]
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, axis in zip(drawn, panels, strict=True):
        _draw(panel, settings, axis, best=best, score=score)
        _finish(panel, axis, score)
    metric = score.rpartition("/")[-1]
    figure.suptitle(
        f"best: {best.name}\n{shown(best.score, metric)}",
        x=0.01,
        ha="left",
        fontsize=10,
        color=INK,
    )
    drawn[0].set_ylabel(score, fontsize=9, color=FAINT)
    return figure


def _draw(
    panel: Axes,
    settings: Sequence[Setting],
    axis: tuple[str, ...],
    *,
    best: Setting,
    score: str,
) -> None:
    """The points of a panel, each with its interval and, small, those of its seeds."""
    places: dict[str, list[Setting]] = {}
    for one in settings:
        places.setdefault(_label(one.overrides, axis), []).append(one)
    for x, group in enumerate(places.values()):
        for number, one in enumerate(group):
            if one.score is None:
                continue
            shift = SPREAD * ((number + 0.5) / len(group) - 0.5) if len(group) > 1 else 0.0
            look = {"color": COLOURS[1], "marker": "D"} if one is best else {"color": COLOURS[0]}
            if len(one.rows) > 1:
                runs = [found.value for row in one.rows if (found := row.score(score))]
                panel.plot([x + shift] * len(runs), runs, ".", color=FAINT, markersize=5, zorder=1)
            below, above = one.score.value - one.score.low, one.score.high - one.score.value
            panel.errorbar(
                [x + shift],
                [one.score.value],
                yerr=[[below], [above]],
                **{"marker": "o", "markersize": 6, "linewidth": 1.6, "capsize": 3, **look},
            )
    panel.set_xticks(range(len(places)), list(places))
    panel.set_xlim(-0.6, len(places) - 0.4)


def _label(overrides: Mapping[str, Any], axis: tuple[str, ...]) -> str:
    return ", ".join(str(overrides[key]) if key in overrides else "recipe's" for key in axis)


def _finish(panel: Axes, axis: tuple[str, ...], score: str) -> None:
    panel.set_xlabel("\n".join(axis), fontsize=9, color=FAINT)
    quiet(panel)
    if score.rpartition("/")[-1] in FRACTIONS:
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
