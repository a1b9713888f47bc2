"""The doctor: what it finds in a sound run, and what a failed check does to the others."""

import functools
import importlib.util
import json
import pathlib
from typing import Any

import pytest
from rich.console import Console

from r1re_jax import files
from r1re_jax.launch import doctor
from r1re_jax.launch.doctor import Result, Status, examine, report, table
from r1re_jax.report.trackers import check_trackers
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.train import parity as parity_module
from r1re_jax.train.config import configuration_hash, read_settings
from r1re_jax.train.workdir import open_workdir
from tests.tiny import tiny_guide, tiny_policy, tiny_tokenizer
from tests.train import world

NAMES = (
    *("config", "versions", "trackers", "devices", "parameters", "memory", "batch"),
    *("data", "policy", "prompts", "workdir", "parity"),
)
# Eight simulated devices, four of which share the questions.
FITTING = {
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "sft__questions": 4,
    "grpo__questions": 8,
    "grpo__micro_batch": 4,
    "model__parity_tokens": 6,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return world.write_inputs(tmp_path_factory.mktemp("inputs"))


def _config(inputs: pathlib.Path, **changes: Any) -> dict[str, Any]:
    return world.config(inputs, **{**FITTING, **changes})


def _examine(config: dict[str, Any], workdir: pathlib.Path | None = None) -> dict[str, Result]:
    results = {result.name: result for result in examine(config, workdir, trackers=check_trackers)}
    assert tuple(results) == NAMES
    return results


def _statuses(results: dict[str, Result]) -> dict[str, list[str]]:
    return {
        status.value: [name for name, result in results.items() if result.status is status]
        for status in Status
    }


@pytest.fixture(scope="module")
def sound(inputs: pathlib.Path) -> dict[str, Result]:
    """The results of a run that is all right."""
    return _examine(_config(inputs), inputs / "new" / "run")


def test_a_service_that_is_not_installed_is_named(
    inputs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quick = {"log": {"wandb": True}, "model__path": "absent", "data__train__path": "absent"}
    found = _examine(_config(inputs, **quick))["trackers"]
    assert found.status is Status.FAILED and "wandb is not installed here" in found.problem
    monkeypatch.undo()
    found = _examine(_config(inputs, **quick | {"log": {}}))["trackers"]
    assert found.found == {"beside metrics.jsonl": "tensorboard"}


def test_a_sound_run_passes(sound: dict[str, Result], inputs: pathlib.Path) -> None:
    assert _statuses(sound) == {"ok": [*NAMES], "failed": [], "skipped": []}
    assert report([*sound.values()])["ok"]
    assert not (inputs / "new").exists(), "nothing was written"
    config = sound["config"].found
    assert config["hash"] == configuration_hash(read_settings(_config(inputs)))
    assert config["steps"] == "2 sft, 2 grpo"
    assert {"python", "jax", "jaxlib", "flax", "optax"} < sound["versions"].found.keys()
    assert sound["devices"].found["mesh"] == "data 2, fsdp 2, sequence 1, tensor 2"
    assert sound["devices"].found["devices"].startswith("8 cpu")


def test_a_steps_tokens_are_counted(sound: dict[str, Result]) -> None:
    guide, question, completion = 400, 48, 56
    tree = guide + 4 * (question + completion)
    flat = 4 * (guide + question + completion)
    found = sound["batch"].found
    assert found["sft step"] == "1 guides × 4 questions × 1 completions"
    assert found["sft tokens"].startswith(f"{tree} on the tree, {flat:,} as flat rows")
    # The guide is computed once for each of two micro-batches.
    tree = 2 * guide + 8 * (question + 2 * completion)
    flat = 8 * 2 * (guide + question + completion)
    assert found["grpo step"] == "1 guides × 8 questions × 2 completions"
    assert found["grpo tokens"] == (
        f"{tree:,} on the tree, {flat:,} as flat rows ({flat / tree:.1f} times as many)"
    )
    assert found["grpo micro-batches"] == "2, of 4 questions × 2 completions"


def test_policy_and_prompts_are_described(sound: dict[str, Result]) -> None:
    encoder, tokenizer = tiny_policy().encoder, tiny_tokenizer()
    policy = sound["policy"].found
    assert policy["stop tokens"].startswith(f"{encoder.stop_ids[0]} '<|im_end|>'")
    assert policy["pad"] == f"{encoder.pad_id} '<|endoftext|>'"
    assert policy["tokenizer"].startswith(f"{len(tokenizer)} tokens")
    guide = len(encoder.guide_tokens(tiny_guide()))
    question = max(len(encoder.question_tokens(example)) for example in world.examples())
    longest = f"guide {guide} of 400, question {question} of 48"
    prompts = sound["prompts"].found
    assert prompts["sft longest"].startswith(f"{longest}, completion ")
    assert prompts["grpo longest"] == longest
    assert "looked at" not in prompts, "all examples are known"
    assert sound["data"].found["eval held"] == "3 examples under 'Tiny'"
    assert sound["parity"].found["tokens"].endswith(", float32")
    assert sound["parity"].found["decode, training"].startswith("mean ")


def test_all_problems_of_a_config_are_named_and_the_rest_is_skipped(
    inputs: pathlib.Path,
) -> None:
    results = _examine(_config(inputs, grpo__grop=2, sft__steps=-1))
    assert _statuses(results)["failed"] == ["config"]
    assert _statuses(results)["ok"] == ["versions"]
    problem = results["config"].problem
    assert "did you mean grpo.group?" in problem and "steps is -1" in problem
    assert results["parity"].problem == "needs config, batch, data, policy"


def test_a_mesh_that_does_not_divide_heads_leaves_the_batch_to_be_checked(
    inputs: pathlib.Path,
) -> None:
    mesh = {"data": 1, "fsdp": 1, "tensor": 8}
    results = _examine(_config(inputs, mesh=mesh), inputs / "new")
    assert _statuses(results)["failed"] == ["parameters"]
    assert _statuses(results)["skipped"] == ["memory", "policy", "prompts", "parity"]
    assert "does not divide" in results["parameters"].problem


def test_a_batch_that_the_mesh_cannot_share_is_refused(inputs: pathlib.Path) -> None:
    results = _examine(_config(inputs, sft__questions=2))
    assert _statuses(results)["failed"] == ["batch"]
    assert _statuses(results)["skipped"] == ["workdir", "parity"]
    assert "make the batch in sft a multiple of 4" in results["batch"].problem
    assert results["workdir"].problem == "give --workdir to check it"


def test_missing_data_leaves_the_policy_to_be_checked(inputs: pathlib.Path) -> None:
    results = _examine(_config(inputs, data__train__path=str(inputs / "absent.jsonl")), inputs)
    assert _statuses(results)["failed"] == ["data"]
    assert "absent.jsonl" in results["data"].problem
    assert _statuses(results)["skipped"] == ["prompts", "workdir", "parity"]
    assert results["policy"].status is Status.OK


def test_prompts_that_are_too_long_and_a_missing_policy_are_refused(
    inputs: pathlib.Path,
) -> None:
    long = _examine(_config(inputs, limits__question=30, model__parity_tokens=0))
    assert _statuses(long)["failed"] == ["prompts"]
    assert "Raise limits.question to " in long["prompts"].problem
    assert long["parity"].problem == "switched off by model.parity_tokens=0"
    absent = _examine(_config(inputs, model__path="absent"))
    assert _statuses(absent)["failed"] == ["parameters"]
    assert "no policy 'absent'" in absent["parameters"].problem


def test_another_runs_work_directory_is_refused_and_left_alone(
    inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    quick = {"model__parity_tokens": 0}
    settings = read_settings(_config(inputs, grpo__group=3))
    data = doctor.open_mixture(settings.data, seed=settings.seed)
    open_workdir(tmp_path / "run", settings, data=data.sha256)
    before = (tmp_path / "run" / "config.json").read_bytes()
    results = _examine(_config(inputs, **quick), tmp_path / "run")
    assert _statuses(results)["failed"] == ["workdir"]
    assert "grpo.group is 3 there and 2 here" in results["workdir"].problem
    same = _examine(_config(inputs, grpo__group=3, **quick), tmp_path / "run")
    assert same["workdir"].found["state"] == "nothing to go on from"
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    same = _examine(_config(inputs, grpo__group=3, **quick), tmp_path / "run")
    assert same["workdir"].found["state"] == "goes on from step 2"
    file = tmp_path / "file"
    file.touch()
    results = _examine(_config(inputs, **quick), file / "run")
    assert f"{file} is a file" in results["workdir"].problem
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**more: Any) -> None:
        raise PermissionError(13, "Permission denied", str(more["dir"]))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    results = _examine(_config(inputs, model__parity_tokens=0), tmp_path / "a" / "b")
    assert _statuses(results)["failed"] == ["workdir"]
    assert results["workdir"].problem == f"[Errno 13] Permission denied: '{tmp_path}'"
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table([*results.values()]))
    assert "[Errno 13] Permission denied" in shown.get(), "brackets are no markup"


def test_a_parity_that_fails_is_shown_with_its_numbers(
    inputs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = functools.partial(completion_logp, temperature=1.5)
    monkeypatch.setattr(parity_module, "completion_logp", wrong)
    # A length of its own, for programs of its own.
    results = _examine(_config(inputs, model__parity_tokens=5))
    assert _statuses(results)["failed"] == ["parity"]
    assert "decode, training: mean " in results["parity"].problem
    found = json.loads(json.dumps(report([*results.values()])))
    assert not found["ok"]
    assert [check["name"] for check in found["checks"]] == [*NAMES]
    assert found["checks"][-1]["status"] == "failed"


def test_lessons_that_are_made_are_looked_at_for_some_steps(inputs: pathlib.Path) -> None:
    config = _config(inputs, model__path="base:miniworld", model__parity_tokens=0)
    stages = [{"until": 1, "kinds": ["general"], "fewest": 3, "most": 4}]
    config["data"]["train"] = {"kind": "miniworld", "options": {"stages": stages}}
    config["data"]["eval"] = {}
    results = _examine(config)
    assert results["data"].found["train"] == "made as they are asked for"
    assert results["prompts"].found["looked at"] == "the first 4 steps of each phase"
    assert "completion " in results["prompts"].found["sft longest"]
    config["limits"]["completion"] = 8
    results = _examine(config)
    assert "longer than the limit of 8 tokens" in results["prompts"].problem


def test_an_error_of_another_kind_is_named_by_its_type(
    inputs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("jax")

    monkeypatch.setattr(doctor, "versions", fail)
    results = _examine(_config(inputs, model__parity_tokens=0))
    assert results["versions"].problem == "KeyError: 'jax'"
    assert _statuses(results)["failed"] == ["versions"]


def test_an_adapter_is_told_from_its_base(inputs: pathlib.Path) -> None:
    config = _config(inputs, model__dtype="bfloat16") | {"lora": {"rank": 2}}
    results = _examine(config)
    assert _statuses(results)["failed"] == []
    found = results["parameters"].found
    assert found["parameters"].endswith(", frozen, and 1,216 of adapters")
    assert "(bfloat16), and 4,864 and " in found["bytes"]
    config["model"] = {"preset": "nano"}
    results = _examine(config | {"tokenizer": str(inputs / "base")})
    assert _statuses(results)["failed"] == ["policy"]
    assert "starts from random weights" in results["policy"].problem
