"""Curves of a run as matplotlib figures, one message each, the sets told apart by colour."""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from r1re_jax import files
from r1re_jax.report.history import History, is_number

# Told apart also without colour vision (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TRAIN = "#4D4D4D"
INK, FAINT = "#222222", "#888888"
SIZE_INCHES, DPI = (6.0, 3.3), 150


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        name: file name without suffix.
        title: what it shows.
        metric: name in metrics.jsonl, or "".
        evaluation: name in metrics.json, or "".
        fraction: shown as per cent.
        phase: only steps of this phase, or "" for all.
    """

    name: str
    title: str
    metric: str = ""
    evaluation: str = ""
    fraction: bool = False
    phase: str = ""


PANELS = (
    Panel(name="accuracy", title="Held-out accuracy (Avg@k)", evaluation="avg_at_k", fraction=True),
    # Of training the mean of single answers, of an evaluation that of all together.
    Panel(
        name="triplet_f1",
        title="F1 of triplets, of 100",
        metric="triplet_f1",
        evaluation="triplet_f1",
    ),
    Panel(
        name="entity_f1", title="F1 of entities, of 100", metric="entity_f1", evaluation="entity_f1"
    ),
    Panel(name="reward", title="Mean reward", metric="reward", evaluation="mean_reward"),
    Panel(
        name="format_rate",
        title="Well-formed completions",
        metric="format_rate",
        evaluation="format_rate",
        fraction=True,
    ),
    Panel(name="kl", title="KL to the reference, per token", metric="kl"),
    Panel(name="entropy", title="Entropy of the policy, nats per token", metric="entropy"),
    # In the warm start this is the length of the completions to learn from.
    Panel(
        name="length",
        title="Completion length, tokens",
        metric="completions/mean_length",
        phase="grpo",
    ),
    Panel(name="sft_loss", title="Loss of the SFT warm start", metric="loss", phase="sft"),
)


def draw_curves(history: History) -> Iterator[tuple[Panel, Figure]]:
    """Yield each panel that has something to show with its figure."""
    for panel in PANELS:
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawn = _draw_training(axes, history, panel) + _draw_evaluations(axes, history, panel)
        if drawn:
            _finish(axes, history, panel)
            yield panel, figure


def png(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes (no date, no version inside)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save_curves(history: History, folder: epath.Path) -> dict[str, epath.Path]:
    """Write every panel as `<name>.png` into `folder`; return the paths by panel name."""
    paths = {}
    for panel, figure in draw_curves(history):
        paths[panel.name] = folder / f"{panel.name}.png"
        files.write(paths[panel.name], png(figure))
    return paths


def smooth(values: Sequence[float], *, window: int) -> list[float]:
    """Trailing mean over up to `window` values; as long as the input, no value from the future."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def _draw_training(axes: Axes, history: History, panel: Panel) -> int:
    """A training metric, thin as it came and bold as its trailing mean; returns the lines drawn."""
    steps, values = history.series(panel.metric, phase=panel.phase) if panel.metric else ([], [])
    if not steps:
        return 0
    window = max(1, len(values) // 25)
    label = "training" if window == 1 else f"training (mean of {window})"
    if window > 1:
        axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, window=window), color=TRAIN, linewidth=1.6, label=label)
    return 1


def _draw_evaluations(axes: Axes, history: History, panel: Panel) -> int:
    """A held-out metric of every set, Avg@k with its interval; returns the lines drawn."""
    drawn = 0
    for colour, name in zip(itertools.cycle(COLOURS), history.sets, strict=False):
        found = [e for e in history.of_set(name) if is_number(e.metrics.get(panel.evaluation))]
        if not panel.evaluation or not found:
            continue
        steps = [e.step for e in found]
        values = [e.metrics[panel.evaluation] for e in found]
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=name)
        drawn += 1
        if panel.evaluation == "avg_at_k":
            _draw_accuracy_extras(axes, history, name, colour)
    return drawn


def _draw_accuracy_extras(axes: Axes, history: History, name: str, colour: str) -> None:
    """The bootstrap interval as a band and the majority label's accuracy as a dotted line."""
    found = history.of_set(name)
    banded = [(e.step, *e.interval) for e in found if e.interval is not None]
    if banded:
        steps, low, high = zip(*banded, strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    majority = found[-1].metrics.get("majority_accuracy")
    if is_number(majority):
        axes.axhline(
            majority, color=colour, linewidth=1.0, linestyle=":", label=f"{name}: majority label"
        )


def quiet(axes: Axes) -> None:
    """Take away the frame and leave faint lines to read values by."""
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#CCCCCC")


def _finish(axes: Axes, history: History, panel: Panel) -> None:
    """Title, axes, the end of the warm start, legend."""
    axes.set_title(panel.title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel("step", fontsize=9, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    quiet(axes)
    if panel.fraction:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.02)
    else:  # each figure by itself: no power of ten above the axis, where GRPO may stand
        axes.yaxis.set_major_formatter("{x:.6g}")
    last = axes.dataLim.x1
    if 0 < history.sft_steps < last:
        axes.axvline(history.sft_steps, color=FAINT, linewidth=0.9, linestyle="--", zorder=1)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        look = {"va": "top", "fontsize": 7.5, "color": FAINT}
        axes.annotate("GRPO", (history.sft_steps, 1), xytext=(3, 4), ha="left", **where, **look)
    handles, labels = axes.get_legend_handles_labels()
    if labels != ["training"]:
        axes.legend(handles, labels, fontsize=8, frameon=False, labelcolor=INK)
