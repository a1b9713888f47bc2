"""Policies in files: whole, from every place that a name can mean, and refused by name."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import r1re_jax
from r1re_jax import policy_source, sharding
from r1re_jax.model.config import Family
from r1re_jax.model.hf import save_hf
from r1re_jax.model.weights import WeightsError
from r1re_jax.policy import Limits, Policy
from r1re_jax.policy_files import load_policy, policy_config, save_policy
from r1re_jax.policy_source import PolicyError
from r1re_jax.task.rewards import RewardTotals
from r1re_jax.task.tasks import TRIPLETS, RelationTask, TaskKind
from tests.drawn import drawn_tensors
from tests.gguf_files import write_gguf
from tests.saved import make_workdir, named, worded_policy
from tests.tiny import tiny_config, tiny_guide, tiny_model


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Random weights, with a template and stop tokens that are not the default ones."""
    return worded_policy()


@pytest.fixture(scope="module")
def folder(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The policy as a Hugging Face folder."""
    place = tmp_path_factory.mktemp("policy") / "export"
    save_policy(policy, place)
    return place


@pytest.fixture(scope="module")
def workdir(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Steps 1, 2 and 10; step 2 scored best."""
    return make_workdir(policy, tmp_path_factory.mktemp("run"), {"1": 0.1, "2": 0.5, "10": 0.4})


def test_a_saved_policy_comes_back_whole(policy: Policy, folder: pathlib.Path) -> None:
    loaded = r1re_jax.load_policy(folder)
    assert loaded.config == policy.config
    assert loaded.limits == policy.limits
    assert loaded.guide_sha256 == policy.guide_sha256
    assert loaded.encoder.template == policy.encoder.template
    assert loaded.encoder.stop_ids == policy.encoder.stop_ids
    assert loaded.encoder.guide_tokens(tiny_guide()) == policy.encoder.guide_tokens(tiny_guide())
    assert loaded.provenance == str(folder)
    row = [1, 2, 3]
    np.testing.assert_array_equal(loaded.logits([row])[0], policy.logits([row])[0])
    recipe = json.loads((folder / "r1re.json").read_text())
    assert set(recipe) == {"template", "limits", "stop_ids", "guide_sha256", "totals"}


def test_what_completions_earned_is_kept(policy: Policy, tmp_path: pathlib.Path) -> None:
    task = RelationTask(RewardTotals(correct=3.0, wrong=-1.0, malformed=-3.0))
    save_policy(policy.for_task(task), tmp_path / "export")
    loaded = load_policy(tmp_path / "export")
    assert loaded.encoder.task == task
    assert loaded.for_kind(TaskKind.RELATION) is loaded
    assert loaded.for_kind(TaskKind.TRIPLETS).encoder.task == TRIPLETS
    recipe = tmp_path / "export" / "r1re.json"
    recipe.write_text(recipe.read_text().replace('"wrong"', '"wrnog"'))
    with pytest.raises(PolicyError, match="wrnog"):
        load_policy(tmp_path / "export")


def test_a_card_is_written_where_one_is_given(
    policy: Policy, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert not (folder / "README.md").exists()
    save_policy(policy, tmp_path / "card", card="# Card\n", max_shard_bytes=20_000)
    assert (tmp_path / "card" / "README.md").read_text() == "# Card\n"
    assert len(list((tmp_path / "card").glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(
        load_policy(tmp_path / "card").logits([[1]])[0], policy.logits([[1]])[0]
    )


def test_a_plain_hugging_face_folder_brings_its_stop_tokens(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "r1re.json").unlink()
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    loaded = load_policy(plain)
    assert loaded.limits == Limits() and loaded.encoder.stop_ids == (2, 0, 1)
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load_policy(plain).encoder.stop_ids == (2, 0, 1)
    (plain / "generation_config.json").unlink()
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load_policy(plain).encoder.stop_ids == (2, 0)


def test_computing_in_bfloat16(policy: Policy, folder: pathlib.Path) -> None:
    loaded = load_policy(folder, dtype="bfloat16")
    found, exact = loaded.logits([[1, 2, 3]])[0], policy.logits([[1, 2, 3]])[0]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 0.2


def test_a_work_directory_gives_its_best_step(policy: Policy, workdir: pathlib.Path) -> None:
    best = load_policy(workdir)
    assert best.provenance == f"{workdir}, step 2"
    assert best.limits == policy.limits and best.encoder.stop_ids == policy.encoder.stop_ids
    for name, array in named(best).items():
        np.testing.assert_array_equal(array, named(policy)[name] * 2, name)
    assert best.generate(["Bob saw"], max_tokens=3)


def test_a_work_directory_gives_the_step_asked_for(policy: Policy, workdir: pathlib.Path) -> None:
    loaded = load_policy(workdir, step=10)
    np.testing.assert_array_equal(named(loaded)["embed"], named(policy)["embed"] * 10)
    with pytest.raises(PolicyError, match=r"no checkpoint of step 3; there are \[1, 2, 10\]"):
        load_policy(workdir, step=3)


def test_parameters_go_to_a_mesh(workdir: pathlib.Path) -> None:
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    loaded = load_policy(workdir, mesh=mesh)
    assert named(loaded)["embed"].sharding.mesh == mesh


def test_without_scores_the_newest_step_is_taken(
    workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "checkpoints/10/meta/metadata").write_text(json.dumps({"scores": {}}))
    assert load_policy(copy).provenance.endswith("step 10")


def test_a_checkpoint_of_another_model_is_refused(
    workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((copy / "policy/config.json").read_text())
    config["intermediate_size"] += 1
    (copy / "policy/config.json").write_text(json.dumps(config))
    with pytest.raises(PolicyError, match="does not hold the parameters of its policy"):
        load_policy(copy)


def test_places_without_a_policy_say_what_was_looked_for(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PolicyError, match="no folder or .gguf file .*/nowhere, no base:NAME"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(PolicyError, match="expected config.json and safetensors"):
        load_policy(tmp_path)
    with pytest.raises(PolicyError, match="is no work directory, so it has no step 3"):
        load_policy(tmp_path, step=3)
    with pytest.raises(PolicyError, match="no base policy 'base:nothing'; there are"):
        load_policy("base:nothing")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="model.gguf is damaged or no GGUF file"):
        load_policy(tmp_path / "model.gguf")
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(PolicyError, match="is a file; expected a .gguf file, or a folder"):
        load_policy(tmp_path / "model.bin")
    (tmp_path / "policy").mkdir()
    with pytest.raises(PolicyError, match="has no checkpoint yet"):
        load_policy(tmp_path)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a GGUF file of random weights, without any tokenizer."""
    config = tiny_config(family=Family.LLAMA, tied=True)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(path, config, drawn_tensors(config)).path


def test_a_model_without_tokenizer_gives_logits_and_says_what_it_lacks(
    gguf: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "r1re.json").unlink()
    (copy / "tokenizer.json").unlink()
    rows = [[1, 2, 3], [4]]
    for source, lacks in (
        (gguf, "m.gguf has a tokenizer of model None"),
        (copy, "no tokenizer.json"),
    ):
        policy = load_policy(source)
        assert [row.shape for row in policy.logits(rows)] == [
            (3, policy.config.vocab),
            (1, policy.config.vocab),
        ]
        assert policy.tokenizer is None
        for ask in (lambda p: p.generate(["tea"]), lambda p: p.encoder.stop_ids):
            with pytest.raises(PolicyError, match=f"this policy has no words: .*{lacks}"):
                ask(policy)
    for here, there in zip(
        load_policy(copy).logits(rows), load_policy(folder).logits(rows), strict=True
    ):
        np.testing.assert_array_equal(here, there)


def test_a_tokenizer_that_is_too_large_is_left_aside(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    save_hf(tiny_model(vocab=64), tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "m")
    policy = load_policy(tmp_path / "m")
    assert policy.logits([[1]])[0].shape == (1, 64)
    with pytest.raises(
        PolicyError, match="no words: the tokenizer has 300 tokens and the model 64"
    ):
        policy.generate(["tea"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_type_of_the_forward(
    folder: pathlib.Path, gguf: pathlib.Path, dtype: str
) -> None:
    for source in (folder, gguf):
        state = nnx.state(load_policy(source, dtype=dtype).model)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {dtype}
        masters = nnx.state(load_policy(source, dtype=dtype, param_dtype="float32").model)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(masters)} == {"float32"}


def test_a_policys_shape_is_read_without_its_weights(
    folder: pathlib.Path, gguf: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for source in (folder, gguf):
        assert policy_config(source) == load_policy(source).config
    with pytest.raises(PolicyError, match="expected config.json and safetensors"):
        policy_config(tmp_path)


def test_a_hub_name_is_asked_for(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    asked = []

    def download(name: str, **settings: object) -> str:
        asked.append(name)
        if name == "some/model":
            return str(folder)
        raise OSError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_policy("some/model").provenance == "some/model"
    with pytest.raises(PolicyError, match="the hub has not given it: offline"):
        load_policy("other/model")
    with pytest.raises(PolicyError, match="no policy './here/model'"):
        load_policy("./here/model")
    assert asked == ["some/model", "other/model"]


def test_broken_files_are_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "r1re.json").write_text("{")
    with pytest.raises(PolicyError, match="r1re.json is not JSON"):
        load_policy(copy)
    (copy / "r1re.json").write_text("[]")
    with pytest.raises(PolicyError, match="r1re.json holds a list"):
        load_policy(copy)
    (copy / "r1re.json").write_text('{"limits": {}}')
    with pytest.raises(PolicyError, match="r1re.json cannot be used: KeyError"):
        load_policy(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(PolicyError, match="has no tokenizer.json"):
        load_policy(copy)


def test_a_foreign_folder_is_not_overwritten(policy: Policy, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(WeightsError, match="nothing is overwritten"):
        save_policy(policy, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_missing_file_of_a_work_directory_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PolicyError, match="config.json is missing"):
        policy_source.read_json(tmp_path / "config.json")
