"""Which steps are traced, and that the parts of a step have names there."""

import contextlib
import pathlib
from typing import Any

import jax
import pytest

from r1re_jax.train.hooks import Hooks
from r1re_jax.train.loop import run_training
from r1re_jax.train.profile import StepProfiler
from tests.train import world

PHASES = [("sft", 1), ("sft", 2), ("sft", 3), ("sft", 4), ("grpo", 5), ("grpo", 6), ("grpo", 7)]


@pytest.mark.parametrize(
    ("steps", "phases", "expected"),
    [
        (1, PHASES, ["sft-2", "sft 3", "grpo-6", "grpo 7"]),
        (2, PHASES, ["sft-2", "sft 4", "grpo-6", "end"]),
        (9, PHASES, ["sft-2", "grpo 5", "grpo-6", "end"]),
        (2, [("sft", 1), ("grpo", 2)], []),
        (0, PHASES, []),
    ],
)
def test_a_phase_is_traced_from_its_second_step_on(
    steps: int,
    phases: list[tuple[str, int]],
    expected: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, now = [], ""

    def start(folder: pathlib.Path, *, profiler_options: Any) -> None:
        assert folder == tmp_path
        events.append(profiler_options.session_id)

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(now))
    profiler = StepProfiler(tmp_path, steps=steps)
    for phase, number in phases:
        now = f"{phase} {number}"
        profiler.before_step(phase, number)
    now = "end"
    profiler.close()
    profiler.close()
    assert events == expected
    assert profiler.traces == expected[::2]


def test_the_parts_of_a_step_have_names_in_its_trace(tmp_path: pathlib.Path) -> None:
    settings = world.settings(
        world.write_inputs(tmp_path),
        model__parity_tokens=0,
        grpo__kl_coefficient=0.0,
        evaluate={"every": 0, "samples": 1, "batch": 4},
        checkpoint__every=0,
    )
    with contextlib.closing(StepProfiler(tmp_path / "profile", steps=1)) as profiler:
        hooks = Hooks(before_step=profiler.before_step)
        run_training(settings, tmp_path / "run", hooks=hooks, mesh=world.one_device_mesh())
    after = {"evaluation", "checkpoint"}
    expected = {
        "sft-2": {"update", *after},
        "grpo-4": {"rollout", "reward", "reference", "update", *after},
    }
    folder = tmp_path / "profile" / "plugins" / "profile"
    assert {path.name for path in folder.iterdir()} == expected.keys()
    for name, parts in expected.items():
        (file,) = (folder / name).glob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        found = [event.name for plane in planes for line in plane.lines for event in line.events]
        assert parts <= set(found)
        assert found.count("train") == 1
