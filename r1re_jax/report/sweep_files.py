"""What a sweep's folder gets: sweep.csv, sweep.md and sweep.png."""

import pathlib
from collections.abc import Sequence

from etils import epath

from r1re_jax import files
from r1re_jax.report.curves import png
from r1re_jax.report.sweep import (
    ACCURACY,
    TRIPLETS,
    Entry,
    default_score,
    read_row,
    settings_of,
)
from r1re_jax.report.sweep_plot import draw_sweep
from r1re_jax.report.sweep_table import as_csv, as_markdown


def write_sweep(
    folder: pathlib.Path,
    entries: Sequence[Entry],
    *,
    axes: Sequence[tuple[str, ...]],
    title: str,
    score: str = "",
) -> None:
    """Write table and picture of the members, as far as they have come.

    Args:
        folder: of the sweep.
        entries: its members.
        axes: keys that vary, those of a zip together.
        title: of the Markdown page.
        score: `SET/METRIC` that settings are judged by; empty for `default_score`.
    """
    metrics = (ACCURACY, TRIPLETS, *filter(None, [score.rpartition("/")[-1]]))
    rows = [read_row(entry, metrics=tuple(dict.fromkeys(metrics))) for entry in entries]
    score = score or default_score(rows)
    where = epath.Path(folder)
    files.write(where / "sweep.csv", as_csv(rows))
    figure = draw_sweep(settings_of(rows, score), axes, score=score)
    if figure is not None:
        files.write(where / "sweep.png", png(figure))
    files.write(where / "sweep.md", as_markdown(rows, title=title, score=score))
