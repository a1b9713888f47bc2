"""Writers: one object a step, a kill loses nothing, resuming drops later steps."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.report.writers import JsonlWriter, TensorBoardWriter, plain, read_metrics


def test_one_object_a_step_with_scalars_of_any_library(tmp_path: pathlib.Path) -> None:
    writer = JsonlWriter(tmp_path / "new" / "metrics.jsonl")
    writer.write(1, {"phase": "sft", "loss": jnp.float32(0.5), "n": np.int64(3), "ok": True})
    writer.write(2, {"loss": float("nan"), "high": np.float32(np.inf), "none": None})
    writer.close()
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "phase": "sft", "loss": 0.5, "n": 3, "ok": True},
        {"step": 2, "loss": None, "high": None, "none": None},
    ]


def test_a_line_is_on_disk_before_close(tmp_path: pathlib.Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_resuming_drops_later_steps_and_the_torn_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    writer = JsonlWriter(path, resume_step=2)
    writer.write(3, {"again": 1})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n'


@given(steps=st.lists(st.integers(0, 20), max_size=12), last=st.none() | st.integers(0, 20))
def test_resuming_keeps_exactly_the_steps_up_to_the_last(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int | None
) -> None:
    path = tmp_path_factory.mktemp("w") / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    JsonlWriter(path, resume_step=last).close()
    kept = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert kept == [step for step in steps if last is None or step <= last]


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object"):
        JsonlWriter(path, resume_step=0)
    assert path.read_text() == '{"step": 1}\nnot json\n'


def test_reading_merges_a_step_and_forgives_a_torn_end(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1}\n{"step": 1, "a": 0}\n{"step": 2, "b": 3, "a": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1, "a": 0}, {"step": 2, "a": 2, "b": 3}]


def test_reading_names_the_bad_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"a": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*integer `step`"):
        read_metrics(path)


def test_what_is_no_scalar_is_refused() -> None:
    with pytest.raises(TypeError, match="scalar or a string, found ndarray"):
        plain(np.zeros(2))
    assert plain(np.float64(1.5)) == 1.5
    assert plain(-math.inf) is None


def test_tensorboard_holds_the_numbers(tmp_path: pathlib.Path) -> None:
    writer = TensorBoardWriter(tmp_path, resume_step=4)
    writer.write(5, {"reward": np.float32(0.25), "phase": "grpo", "kl": float("nan")})
    writer.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    data = file.read_bytes()
    assert b"reward" in data
    assert b"phase" not in data
    assert b"kl" not in data
