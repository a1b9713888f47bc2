"""Runs that train an adapter: the base stays, the adapter alone is kept, and all else is equal."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from r1re_jax.model.lora import Lora, is_adapter
from r1re_jax.policy_files import load_policy, save_adapter, save_policy
from r1re_jax.policy_source import PolicyError, find, lasting, read_adapted
from r1re_jax.report.card import model_card
from r1re_jax.task import tasks
from r1re_jax.train.config import read_settings
from r1re_jax.train.settings import Settings
from r1re_jax.train.start import Start, abstract_model, load_start, policy_of
from r1re_jax.train.workdir import WorkdirError
from tests.drawn import drawn_tensors
from tests.gguf_files import as_metadata, write_gguf
from tests.oracles.lora import arrays, merged_by_hand
from tests.tiny import tiny_policy
from tests.train import world
from tests.train.world import (
    StopAt,
    assert_bit_equal,
    mesh_of,
    metrics,
    one_device_mesh,
    some_verdict,
    train,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
LORA = {"rank": 2, "alpha": 8.0}
RATE = 0.05  # of an adapter: what a full run of this size takes is too little
EVALUATED = {"evaluate__samples": 1, "evaluate__batch": 3}
QUIET = {"evaluate__samples": 0, "grpo__steps": 0}
# The KL (k3) of two programs that compute the same log-probabilities: half the square of some 1e-7.
ROUNDING = 1e-12


@pytest.fixture(autouse=True, scope="module")
def _spread_rewards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "relation_reward", some_verdict)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return world.write_inputs(tmp_path_factory.mktemp("inputs"))


def _settings(inputs: pathlib.Path, **changes: Any) -> Settings:
    """Two SFT steps on the same lessons, two of GRPO, of an adapter."""
    fast = {"sft__learning_rate": RATE, "grpo__learning_rate": RATE, "sft__cycle": 1}
    values = world.config(inputs, **(fast | EVALUATED | changes))
    return read_settings({"lora": LORA, **values})


@pytest.fixture(scope="module")
def whole(inputs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work directory of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    settings = _settings(inputs, grpo__kl_coefficient=0.1, checkpoint__keep=4)
    assert train(settings, workdir).step == 4
    return workdir


def _start(settings: Settings) -> Start:
    return load_start(settings, mesh=one_device_mesh(), guides=(), fresh=True)


def _saved(workdir: pathlib.Path, place: str) -> Mapping[str, np.ndarray]:
    """Arrays of a folder as they are there, whatever their names."""
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (workdir / place).absolute()
        shapes = checkpointer.metadata(folder).item_metadata.tree
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in dict(shapes).items()}
        return jax.device_get(checkpointer.restore(folder, shapes))


def test_checkpoints_and_reference_hold_the_adapter_alone(whole: pathlib.Path) -> None:
    rows = metrics(whole)
    assert [row.get("phase") for row in rows] == [None, "sft", "sft", "grpo", "grpo"]
    assert rows[2]["loss"] < rows[1]["loss"]
    assert rows[3]["kl"] <= ROUNDING < rows[4]["kl"], "the reference is what GRPO began with"
    saved = {step: _saved(whole, f"checkpoints/{step}/params") for step in (2, 4)}
    assert all(map(is_adapter, saved[4]))
    assert_bit_equal(_saved(whole, "reference/2"), saved[2])
    assert any((saved[4][name] != saved[2][name]).any() for name in saved[2])
    found = read_adapted(whole)
    assert (found.step, found.dtype, found.lora) == (None, "float32", Lora(**LORA))


def test_without_sft_the_base_is_the_reference_and_nothing_is_written(
    inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    of = {"sft__steps": 0, "evaluate__samples": 0, "grpo__kl_coefficient": 0.1}
    assert train(_settings(inputs, **of), tmp_path / "one").step == 2
    assert not (tmp_path / "one" / "reference").exists()
    rows = metrics(tmp_path / "one")
    assert rows[0]["kl"] <= ROUNDING < rows[1]["kl"]
    train(_settings(inputs, grpo__steps=1, **of), tmp_path / "two")
    assert train(_settings(inputs, **of), tmp_path / "two").step == 2
    assert metrics(tmp_path / "two") == rows, "a resumed run has the same reference"
    one, two = (_saved(tmp_path / name, "checkpoints/2/params") for name in ("one", "two"))
    assert_bit_equal(two, one)


def test_stopping_anywhere_changes_nothing(
    inputs: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = _settings(inputs, grpo__kl_coefficient=0.1, checkpoint__keep=4)
    for stop, step in ((StopAt("update", 2), 1), (StopAt("reward", 1), 2), (StopAt("held", 1), 4)):
        assert train(settings, tmp_path, poll=stop.poll, progress=stop).step == step
    assert train(settings, tmp_path).step == 4
    assert metrics(tmp_path) == metrics(whole)
    for step in (1, 2, 3, 4):
        folder = f"checkpoints/{step}/params"
        assert_bit_equal(_saved(tmp_path, folder), _saved(whole, folder))
    for name in ("eval/4-held/predictions.jsonl", "completions/4.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_work_directory_is_the_merged_policy(inputs: pathlib.Path, whole: pathlib.Path) -> None:
    start = _start(_settings(inputs))
    base = arrays(load_policy(inputs / "base").model)
    rows = [[1, 2, 3, 4, 5], [6]]
    before = load_policy(inputs / "base").logits(rows)
    for step in (2, 4):
        adapter = _saved(whole, f"checkpoints/{step}/params")
        policy = load_policy(whole, step=step)
        assert policy.provenance.endswith(f"step {step}")
        expected = merged_by_hand(base, dict(adapter), Lora(**LORA))
        for name, value in arrays(policy.model).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
        trained = policy_of(start, jax.device_put(dict(adapter))).logits(rows)
        for one, other, plain in zip(policy.logits(rows), trained, before, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
            assert np.abs(one - plain).max() > 0.01
    spread = load_policy(whole, mesh=mesh_of(2, 2, 2), param_dtype="bfloat16")
    for name, value in arrays(spread.model).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(value.astype(np.float32), expected[name], rtol=2**-8)


def test_an_export_is_the_merged_policy_to_others_too(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    policy = load_policy(whole, step=4)
    card = model_card(policy, whole, name="tiny", step=4)
    assert "- **LoRA**: rank 2, alpha 8, merged; adapted are `layers\\.(query|key|" in card
    save_policy(policy, tmp_path / "out", card=card)
    rows = [[1, 2, 3, 4, 5, 6, 7]]
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = network(torch.tensor(rows)).logits[0].numpy()
    np.testing.assert_allclose(policy.logits(rows)[0], theirs, atol=1e-4)
    again = load_policy(tmp_path / "out")
    assert_bit_equal(arrays(again.model), arrays(policy.model))


def test_an_adapter_goes_to_peft_alone(
    inputs: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_adapter(whole, tmp_path / "adapter", step=4)
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 8.0, "LORA")
    assert config["base_model_name_or_path"] == str(inputs / "base")
    parts = ["down", "gate", "k", "o", "q", "up", "v"]
    assert config["target_modules"] == [f"{part}_proj" for part in parts]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    network = transformers.AutoModelForCausalLM.from_pretrained(inputs / "base")
    rows = [[1, 2, 3, 4, 5, 6, 7]]
    with torch.no_grad():
        for name, down in tensors.items():
            module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
            if side == "A.weight":
                up = torch.tensor(tensors[name.replace("lora_A", "lora_B")])
                network.get_submodule(module).weight += 8 / 2 * up @ torch.tensor(down)
        theirs = network(torch.tensor(rows)).logits[0].numpy()
    ours = load_policy(whole, step=4).logits(rows)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    with pytest.raises(PolicyError, match="holds no adapter"):
        save_adapter(inputs / "base", tmp_path / "other")


def test_the_command_exports_the_adapter(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "run.export", f"--workdir={whole}", "--adapter", "--step=3"]
    run = lambda *more: subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    done = run(f"--out={tmp_path / 'adapter'}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    pushed = run(f"--out={tmp_path / 'other'}", "--push=ann/tiny")
    assert pushed.returncode == 1 and "no policy that could be pushed" in pushed.stderr
    assert not (tmp_path / "other").exists()


# Which base.


@pytest.fixture
def moved(whole: pathlib.Path, inputs: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the run, its base beside it."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(inputs / "base", tmp_path / "base")
    _say(tmp_path / "run", base=str(tmp_path / "base"))
    return tmp_path


def _say(run: pathlib.Path, **changes: Any) -> None:
    path = run / "policy" / "lora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_base_is_refused(moved: pathlib.Path, inputs: pathlib.Path) -> None:
    longer = _settings(inputs, grpo__kl_coefficient=0.1, checkpoint__keep=4, grpo__steps=3)
    shutil.rmtree(moved / "base")
    save_policy(tiny_policy(1, tied=True), moved / "base")
    for use in (lambda: load_policy(moved / "run"), lambda: train(longer, moved / "run")):
        with pytest.raises(PolicyError, match="is not the base that this run's adapter was"):
            use()
    shutil.rmtree(moved / "base")
    with pytest.raises(PolicyError, match=r"holds an adapter, but not its base: no policy"):
        load_policy(moved / "run")
    with pytest.raises(PolicyError, match="no policy"):
        train(longer, moved / "run")
    _say(moved / "run", base=str(inputs / "base"))
    assert train(longer, moved / "run").step == 5, "the base is looked for where lora.json says"
    (moved / "run" / "policy" / "lora.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"lora.json cannot be used: KeyError\('lora'\)"):
        load_policy(moved / "run")
    (moved / "run" / "policy" / "lora.json").unlink()
    with pytest.raises(PolicyError, match="says of which base, is missing"):
        train(longer, moved / "run")


def test_another_adapter_is_refused(moved: pathlib.Path, inputs: pathlib.Path) -> None:
    values = world.config(inputs, sft__learning_rate=RATE, grpo__learning_rate=RATE, **EVALUATED)
    with pytest.raises(WorkdirError, match=r"lora\.rank is 2 there and 3 here"):
        train(read_settings({**values, "lora": {**LORA, "rank": 3}}), moved / "run")
    _say(moved / "run", lora={**LORA, "rank": 3, "targets": Lora().targets})
    with pytest.raises(PolicyError, match="does not hold the parameters of its policy"):
        load_policy(moved / "run")


def test_what_is_no_base_is_refused(inputs: pathlib.Path, whole: pathlib.Path) -> None:
    with pytest.raises(PolicyError, match="holds an adapter itself.*begin from the export"):
        _start(_settings(inputs, model__path=str(whole)))
    values = world.config(inputs) | {"lora": LORA, "tokenizer": str(inputs / "base")}
    values["model"] = {"preset": "nano"}
    with pytest.raises(PolicyError, match="starts from random weights, which an adapter leaves"):
        _start(read_settings(values))
    assert abstract_model(read_settings(values)).config.width == 256, "its shapes can be looked at"
    with pytest.raises(ValueError, match="matches no matrix; there are"):
        _start(read_settings({**world.config(inputs), "lora": {"rank": 1, "targets": "wq"}}))


def test_every_kind_of_base_is_found_again(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    assert lasting("base") == str(inputs / "base")
    (inputs / "base:miniworld").mkdir()
    assert lasting("base:miniworld") == "base:miniworld", "as `find` has it"
    assert lasting("smollm2-135m") == "smollm2-135m" and lasting("Org/Name") == "Org/Name"
    start = _start(_settings(inputs, model__path="base:miniworld"))
    assert start.adapted.base == "base:miniworld" and start.adapted.step is None
    assert start.policy.provenance == "base:miniworld"
    assert find(start.adapted.base).is_dir()


def test_a_run_of_all_parameters_can_be_the_base(
    inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train(world.settings(inputs, sft__steps=1, **QUIET), tmp_path / "base")
    of = {"model__path": str(tmp_path / "base"), **QUIET}
    assert train(_settings(inputs, sft__steps=1, **of), tmp_path / "run").step == 1
    assert read_adapted(tmp_path / "run").step == 1
    expected = load_policy(tmp_path / "run").logits([[1, 2, 3]])
    train(world.settings(inputs, sft__steps=2, **QUIET), tmp_path / "base")
    found = load_policy(tmp_path / "run").logits([[1, 2, 3]])
    np.testing.assert_array_equal(found, expected, err_msg="its step is remembered")
    assert train(_settings(inputs, sft__steps=2, **of), tmp_path / "run").step == 2


def test_a_gguf_file_can_be_the_base(inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    policy = tiny_policy()
    words = as_metadata(
        inputs / "base",
        "gpt-2",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=policy.tokenizer.chat_template,
    )
    file = tmp_path / "base.gguf"
    write_gguf(file, policy.config, drawn_tensors(policy.config), words=words)
    settings = _settings(inputs, model__path=str(file), sft__steps=1, limits__guide=448, **QUIET)
    assert train(settings, tmp_path / "run").step == 1
    assert read_adapted(tmp_path / "run").base == str(file)
    base = arrays(load_policy(file).model)
    adapter = _saved(tmp_path / "run", "checkpoints/1/params")
    merged = merged_by_hand(base, adapter, Lora(**LORA))
    for name, value in arrays(load_policy(tmp_path / "run").model).items():
        np.testing.assert_allclose(value, merged[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_base_in_bfloat16_is_the_one_that_the_adapter_was_trained_on(
    inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = _settings(inputs, model__dtype="bfloat16", sft__steps=1, **QUIET)
    assert train(settings, tmp_path).step == 1
    assert read_adapted(tmp_path).dtype == "bfloat16"
    adapter = _saved(tmp_path, "checkpoints/1/params")
    base = arrays(load_policy(inputs / "base").model)
    merged = merged_by_hand(base, adapter, Lora(**LORA))
    for name, value in arrays(load_policy(tmp_path).model).items():
        np.testing.assert_allclose(value, merged[name], rtol=1e-6, atol=1e-7, err_msg=name)
