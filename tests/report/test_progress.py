"""Progress: what is shown, the pace, and that there is always a sign of life."""

import contextlib
import io
import time

from rich.console import Console

from r1re_jax.report.progress import (
    LiveProgress,
    PlainProgress,
    Status,
    clock,
    open_progress,
)


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 245, 3723)] == ["0:00", "1:00", "4:05", "1:02:03"]


def test_pace_counts_from_where_the_phase_was_resumed() -> None:
    status = Status(phase="grpo", first=60, step=70, total=100, began=1000.0)
    assert status.eta(1020.0) == 60.0
    assert Status(first=60, step=60, total=100).eta(5.0) is None
    assert Status(step=3).eta(5.0) is None


def test_line_shows_known_figures_only() -> None:
    values = {"reward": 1.234, "format_rate": 0.97, "kl": None, "unknown": 3.0, "phase": "grpo"}
    line = Status(phase="grpo", step=1, total=4, values=values, note="rollout").line(2.0)
    assert line == "[grpo 1/4]  0:02 elapsed, 0:06 to go  reward +1.23  format 97%  rollout"


def test_a_phase_says_that_its_first_step_compiles() -> None:
    assert Status(phase="grpo", total=9, note="update").doing == "update (compiling)"
    assert Status(phase="grpo", total=9, note="rollout 8/64").doing == "rollout 8/64"
    assert Status(phase="grpo", first=3, step=4, total=9, note="update").doing == "update"


def test_plain_lines_for_phases_and_the_last_step() -> None:
    stream = io.StringIO()
    with contextlib.closing(PlainProgress(stream, heartbeat=60)) as progress:
        progress.phase("sft", total=3)
        for step in (1, 2, 3):
            progress.write(step, {"loss": 1.0 / step})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # steps 1 and 2 came at once
    assert lines[0].startswith("[sft 0/3]")
    assert lines[1].startswith("[sft 3/3]")
    assert "loss 0.333" in lines[1]


def test_plain_gives_signs_of_life_when_nothing_happens() -> None:
    stream = io.StringIO()
    with contextlib.closing(PlainProgress(stream, heartbeat=0.04)) as progress:
        progress.phase("grpo", total=9)
        progress.tick("rollout 3/64")
        deadline = time.monotonic() + 10
        while stream.getvalue().count("rollout 3/64") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stream.getvalue().count("rollout 3/64") >= 2


def test_a_closed_stream_does_not_end_the_run() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, heartbeat=60)
    stream.close()
    progress.phase("grpo", total=1)
    progress.write(1, {})
    progress.close()


def test_live_block_shows_phase_times_and_figures() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with contextlib.closing(LiveProgress(console)) as progress:
        progress.phase("grpo", total=10, done=4)
        progress.write(5, {"reward": 0.5, "tokens_per_second": 1234.0})
        progress.write(6, {"reward": 0.75})
        progress.tick("evaluate ood 32/400")
    with console.capture() as capture:
        console.print(progress.render())
    text = capture.get()
    for part in ("grpo", "6/10", "to go", "evaluate ood 32/400", "+0.75", "1,234", "tokens/s"):
        assert part in text


def test_the_stream_decides() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, kind in ((io.StringIO(), PlainProgress), (Terminal(), LiveProgress)):
        with contextlib.closing(open_progress(stream)) as progress:
            assert type(progress) is kind
