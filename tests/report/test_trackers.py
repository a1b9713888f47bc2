"""Services beside metrics.jsonl: what they are told, and that none of them ends a run."""

import importlib.util
import pathlib
import sys
import types
from typing import Any

import pytest

from r1re_jax.report.trackers import TrackerError, check_trackers, open_trackers
from r1re_jax.train.settings import LogSettings

NONE = LogSettings(tensorboard=False)
WANDB = LogSettings(tensorboard=False, wandb=True, project="p")
BOTH = LogSettings(tensorboard=False, wandb=True, trackio=True)


class Service(types.ModuleType):
    """Records what it is told, as wandb and trackio are told it."""

    def __init__(self, name: str, *, fails: str = ""):
        super().__init__(name)
        self.fails, self.began, self.told, self.finished = fails, [], [], 0

    def init(self, **asked: Any) -> None:
        if self.fails == "init":
            raise RuntimeError("No API key configured")
        self.began.append(asked)

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        if self.fails == "log":
            raise ConnectionError("unreachable")
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def service(patch: pytest.MonkeyPatch, name: str, **more: Any) -> Service:
    made = Service(name, **more)
    patch.setitem(sys.modules, name, made)
    return made


def test_numbers_reach_a_service_under_their_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = service(monkeypatch, "wandb")
    (writer,) = open_trackers(WANDB, tmp_path, config={"seed": 0}, resume_step=-1)
    writer.write(3, {"reward": 1.5, "phase": "grpo", "kl": None, "ok": 2})
    writer.close()
    assert wandb.told == [(3, {"reward": 1.5, "ok": 2})] and wandb.finished == 1
    (asked,) = wandb.began
    assert asked["project"] == "p" and asked["name"] == tmp_path.name
    assert asked["config"] == {"seed": 0} and asked["resume"] == "allow"


def test_a_run_that_goes_on_goes_on_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, trackio = service(monkeypatch, "wandb"), service(monkeypatch, "trackio")
    for step in (-1, 4):
        open_trackers(BOTH, tmp_path, config={}, resume_step=step)
    assert wandb.began[0]["id"] == wandb.began[1]["id"]
    assert trackio.began[0]["name"] == trackio.began[1]["name"]
    other = tmp_path / "other"
    other.mkdir()
    open_trackers(BOTH, other, config={}, resume_step=-1)
    assert wandb.began[2]["id"] != wandb.began[0]["id"]


def test_a_service_that_cannot_be_reached_does_not_end_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service(monkeypatch, "wandb", fails="log")
    (writer,) = open_trackers(WANDB, tmp_path, config={}, resume_step=-1)
    for step in (1, 2):
        writer.write(step, {"reward": 1.0})
    writer.close()
    assert caplog.text.count("wandb takes no figures, the run goes on: unreachable") == 1


def test_a_service_that_refuses_the_run_says_what_it_wants(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service(monkeypatch, "wandb", fails="init")
    with pytest.raises(TrackerError, match=r"No API key configured.*WANDB_API_KEY"):
        open_trackers(WANDB, tmp_path, config={}, resume_step=-1)


def test_a_service_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"log\.trackio is set.*-e \'\.\[track\]\'"):
        check_trackers(LogSettings(trackio=True))
    check_trackers(LogSettings())


def test_tensorboard_is_the_default_and_can_be_left_out(tmp_path: pathlib.Path) -> None:
    (board,) = open_trackers(LogSettings(), tmp_path, config={}, resume_step=-1)
    board.write(1, {"reward": 1.0})
    board.close()
    assert list((tmp_path / "tensorboard").iterdir())
    assert open_trackers(NONE, tmp_path / "none", config={}, resume_step=-1) == ()
    assert not (tmp_path / "none").exists()
