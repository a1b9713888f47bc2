"""Whose a work directory is, and what is refused."""

import json
import pathlib
from typing import Any

import pytest

from r1re_jax.train.config import read_settings
from r1re_jax.train.settings import Settings
from r1re_jax.train.workdir import (
    WorkdirError,
    check_workdir,
    forget_after,
    open_workdir,
    read_config,
    write_text,
)
from tests.train.world import config

DATA = {"train.jsonl": "abc"}


def _settings(**changes: Any) -> Settings:
    return read_settings(config(pathlib.Path("/inputs"), **changes))


def test_a_new_directory_gets_the_resolved_config(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path / "new" / "run", _settings(), data=DATA)
    found = read_config(tmp_path / "new" / "run")
    assert found["config"]["grpo"]["inner_iterations"] == 1
    assert len(found["hash"]) == 16
    assert {"jax", "python", "r1re_jax"} <= found["versions"].keys()
    assert found["data"] == DATA


def test_the_same_configuration_changes_nothing(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path, _settings(), data=DATA)
    before = (tmp_path / "config.json").read_bytes()
    open_workdir(tmp_path, _settings(), data=DATA)
    assert (tmp_path / "config.json").read_bytes() == before


def test_another_configuration_is_refused_with_every_key(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path, _settings(), data=DATA)
    before = (tmp_path / "config.json").read_bytes()
    other = _settings(grpo__group=4, sft__learning_rate=0.5, grpo__steps=9)
    with pytest.raises(WorkdirError) as error:
        open_workdir(tmp_path, other, data={"train.jsonl": "xyz"})
    text = str(error.value)
    assert "grpo.group is 2 there and 4 here" in text
    assert "sft.learning_rate is 0.01 there and 0.5 here" in text
    assert "the content of train.jsonl is not what it was" in text
    assert "grpo.steps" not in text, "steps are safe"
    assert (tmp_path / "config.json").read_bytes() == before


def test_safe_keys_may_change_and_are_remembered(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path, _settings(), data=DATA)
    open_workdir(tmp_path, _settings(grpo__steps=9, evaluate__samples=1), data=DATA)
    found = read_config(tmp_path)
    assert found["config"]["grpo"]["steps"] == 9
    assert found["history"][0]["changed"]["grpo.steps"] == [2, 9]
    assert found["history"][0]["changed"]["evaluate.samples"] == [0, 1]


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path, _settings(), data=DATA)
    path = tmp_path / "config.json"
    older = json.loads(path.read_text())
    del older["config"]["grpo"]["dual_clip"], older["config"]["reward"]
    path.write_text(json.dumps(older))
    with pytest.raises(WorkdirError, match="grpo.dual_clip is 0.0 there and 3.0 here"):
        check_workdir(tmp_path, _settings(grpo__dual_clip=3.0), data=DATA)
    open_workdir(tmp_path, _settings(), data=DATA)
    assert read_config(tmp_path)["config"]["reward"]["correct"] == 3.0
    older["config"]["grpo"]["gone"] = 1
    path.write_text(json.dumps(older))
    with pytest.raises(WorkdirError, match="grpo.gone is 1 there and None here"):
        check_workdir(tmp_path, _settings(), data=DATA)


def test_a_schedule_of_another_length_is_explained(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path, _settings(grpo__schedule="linear"), data=DATA)
    with pytest.raises(WorkdirError, match="give decay_steps the value it has there"):
        open_workdir(tmp_path, _settings(grpo__schedule="linear", grpo__steps=9), data=DATA)
    kept = _settings(grpo__schedule="linear", grpo__steps=9, grpo__decay_steps=2)
    open_workdir(tmp_path, kept, data=DATA)


@pytest.mark.parametrize(("saved", "new", "fits"), [(2, 5, True), (3, 5, False), (1, 1, True)])
def test_the_warm_start_cannot_change_once_grpo_began(
    tmp_path: pathlib.Path, saved: int, new: int, fits: bool
) -> None:
    open_workdir(tmp_path, _settings(sft__steps=2), data=DATA)
    (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
    if fits:
        open_workdir(tmp_path, _settings(sft__steps=new), data=DATA)
    else:
        with pytest.raises(
            WorkdirError, match="sft.steps was 2 and is 5, but the run is at step 3"
        ):
            open_workdir(tmp_path, _settings(sft__steps=new), data=DATA)


def test_files_of_an_unknown_run_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(WorkdirError, match="has metrics.jsonl but no config.json"):
        open_workdir(tmp_path, _settings(), data=DATA)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "is not JSON"), ("[]", "no configuration"), (None, "is missing")]
)
def test_a_bad_config_json_is_named(tmp_path: pathlib.Path, text: str, expected: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match=expected):
        read_config(tmp_path)


def test_what_later_steps_wrote_is_removed_and_nothing_else(tmp_path: pathlib.Path) -> None:
    for name in ("completions/2.jsonl", "completions/10.jsonl", "eval/2-a/x", "eval/3-a-b/x"):
        write_text(tmp_path / name, "")
    write_text(tmp_path / "completions" / "notes.jsonl", "mine")
    assert forget_after(tmp_path, 2) == ["completions/10.jsonl", "eval/3-a-b"]
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["completions/2.jsonl", "completions/notes.jsonl", "eval/2-a/x"]
    assert forget_after(tmp_path / "absent", 0) == []


def test_a_check_alone_writes_nothing(tmp_path: pathlib.Path) -> None:
    content = check_workdir(tmp_path / "new", _settings(), data=DATA)
    assert content["config"]["seed"] == 3
    assert not (tmp_path / "new").exists()


def test_tuples_of_a_config_are_the_lists_that_json_gives_back(tmp_path: pathlib.Path) -> None:
    options = {"stages": ({"kinds": ("invented",)},)}
    for _ in range(2):
        open_workdir(tmp_path, _settings(data__train__options=options), data=DATA)
    assert read_config(tmp_path)["history"] == []


def test_config_json_is_json(tmp_path: pathlib.Path) -> None:
    open_workdir(tmp_path, _settings(), data=DATA)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 3


def test_keys_that_an_earlier_version_did_not_know_had_their_defaults(
    tmp_path: pathlib.Path,
) -> None:
    open_workdir(tmp_path, _settings(), data=DATA)
    content = read_config(tmp_path)
    del content["config"]["lora"], content["config"]["grpo"]["refill"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    adapted = {**config(pathlib.Path("/inputs")), "lora": {"rank": 2}}
    with pytest.raises(WorkdirError, match="lora.rank is 0 there and 2 here"):
        open_workdir(tmp_path, read_settings(adapted), data=DATA)
    open_workdir(tmp_path, _settings(), data=DATA)
    assert read_config(tmp_path)["config"]["lora"]["rank"] == 0
    assert read_config(tmp_path)["history"] == []
