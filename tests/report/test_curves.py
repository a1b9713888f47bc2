"""Curves: which panels there are, and what is drawn in them."""

import json
import pathlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.report.curves import draw_curves, png, save_curves, smooth
from r1re_jax.report.history import read_history

PNG = b"\x89PNG\r\n\x1a\n"


def test_panels_are_those_with_figures(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    paths = save_curves(read_history(workdir), tmp_path / "curves")
    expected = {"accuracy", "reward", "format_rate", "kl", "entropy", "sft_loss"}  # no length here
    assert set(paths) == expected
    assert all(path.read_bytes().startswith(PNG) for path in paths.values())


def test_accuracy_panel_draws_each_set_with_band_and_majority(workdir: pathlib.Path) -> None:
    figures = {panel.name: figure for panel, figure in draw_curves(read_history(workdir))}
    (axes,) = figures["accuracy"].axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["in_domain"].get_xdata(), [0, 4, 7, 10])
    np.testing.assert_allclose(lines["in_domain"].get_ydata(), [0.2, 0.4, 0.55, 0.7])
    np.testing.assert_allclose(lines["ood: majority label"].get_ydata(), 0.25)
    assert len(axes.collections) == 2
    assert [text.get_text() for text in axes.texts] == ["GRPO"]


def test_the_loss_shown_is_of_the_warm_start_alone(workdir: pathlib.Path) -> None:
    figures = {panel.name: figure for panel, figure in draw_curves(read_history(workdir))}
    (line,) = figures["sft_loss"].axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])


def test_small_figures_leave_the_place_above_the_axis_free(tmp_path: pathlib.Path) -> None:
    """It is where the end of the warm start is named."""
    rows = [{"step": step, "phase": "grpo", "kl": step * 1e-5} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((_, figure),) = draw_curves(read_history(tmp_path))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert "1e−05" in [label.get_text() for label in axes.get_yticklabels()]


def test_equal_runs_give_equal_pictures(workdir: pathlib.Path) -> None:
    history = read_history(workdir)
    first, second = (png(next(draw_curves(history))[1]) for _ in range(2))
    assert first == second


def test_missing_values_are_skipped(tmp_path: pathlib.Path) -> None:
    rows = [{"step": 1, "reward": None}, {"step": 2, "reward": 0.5}, {"step": 3, "reward": True}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((panel, figure),) = draw_curves(read_history(tmp_path))
    assert panel.name == "reward"
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [2])


@given(
    values=st.lists(st.floats(-1e3, 1e3), max_size=30),
    window=st.integers(1, 8),
)
def test_smooth_is_the_trailing_mean(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(smooth(values, window=window), expected, atol=1e-9)
