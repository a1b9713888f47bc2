"""Folders written and read: exact, whole or not at all, and every mismatch named at once."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from r1re_jax.model import weights
from r1re_jax.model.config import Family, ModelConfig
from r1re_jax.model.hf import INDEX, load_hf, save_hf
from r1re_jax.model.names import NAMES
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen
from r1re_jax.model.weights import WeightsError
from tests.drawn import drawn_model
from tests.train.world import mesh_of

CONFIG = ModelConfig(
    vocab=20, layers=2, width=8, query_heads=2, kv_heads=1, head_size=4, mlp_width=12
)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model() -> Qwen:
    """Return a small untied model of random weights, biases and norms."""
    return drawn_model(CONFIG)


@pytest.fixture(scope="module")
def _saved(model: Qwen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_hf(model, folder, stop_ids=[3, 4], pad_id=0)
    return folder


@pytest.fixture
def folder(_saved: Path, tmp_path: Path) -> Path:
    """Return a folder that the test may damage."""
    return Path(shutil.copytree(_saved, tmp_path / "model"))


def leaves(model: Qwen) -> dict[str, np.ndarray]:
    """Return parameters by dotted name."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def assert_equal(a: Qwen, b: Qwen) -> None:
    """Compare structure and every bit of every parameter."""
    assert nnx.graphdef(a) == nnx.graphdef(b)
    first, second = leaves(a), leaves(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "lacks"), [("qwen2", "_norm.weight"), ("qwen3", ".bias"), ("llama", "")]
)
def test_the_table_names_every_parameter_once(family: str, lacks: str, tied: bool) -> None:
    config = ModelConfig(**{**CONFIG.__dict__, "tied": tied, "family": Family(family)})
    state = nnx.to_flat_state(nnx.state(abstract_qwen(config)))
    of_some = {name.ours for name in NAMES if re.search(r"(query|key)_norm|\.bias", name.ours)}
    absent = {name for name in of_some if name.endswith(lacks)} | ({"head"} if tied else set())
    names = [name.ours for name in NAMES if name.ours not in absent]
    assert sorted(names) == sorted(".".join(map(str, path)) for path, _ in state)
    assert len({name.hf for name in NAMES}) == len({name.gguf for name in NAMES}) == len(NAMES)


def test_float32_round_trip_is_exact(model: Qwen, folder: Path) -> None:
    assert_equal(load_hf(folder), model)


def test_linear_weights_are_transposed_there(model: Qwen, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    ours = model.layers.up.weight[...]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"], ours[1].T)
    assert len(tensors) == 3 + 12 * CONFIG.layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_and_read_as_float32(
    model: Qwen, tmp_path: Path, dtype: str
) -> None:
    save_hf(model, tmp_path / "half", dtype=dtype)
    for name, array in leaves(load_hf(tmp_path / "half")).items():
        assert array.dtype == np.float32
        rounded = leaves(model)[name].astype(jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_array_equal(array, rounded, err_msg=name)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype


def test_shards_hold_the_same(model: Qwen, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    save_hf(model, folder, max_shard_bytes=1000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    # A shard is over the limit only where it is one tensor.
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 1000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in leaves(model).values())
    assert_equal(load_hf(folder), model)


def test_loading_sets_what_the_forward_needs(folder: Path) -> None:
    model = load_hf(folder, dtype="bfloat16", remat=Remat.LAYER)
    assert (model.dtype, model.remat, model.config) == (jnp.bfloat16, Remat.LAYER, CONFIG)
    assert model.embed[...].dtype == jnp.float32


def test_generation_config(folder: Path) -> None:
    content = json.loads((folder / "generation_config.json").read_text())
    ids = {"bos_token_id": None, "eos_token_id": [3, 4], "pad_token_id": 0}
    assert content == {**ids, "do_sample": False}


# What cannot be loaded.


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no model folder .*nowhere.*config.json"):
        load_hf(tmp_path / "nowhere")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="config.json is missing"):
        load_hf(folder)


@pytest.mark.parametrize(("text", "error"), [("{", "is not JSON"), ("[]", "holds a list")])
def test_broken_config(folder: Path, text: str, error: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=f"{folder.name}.*{error}"):
        load_hf(folder)


def change_config(folder: Path, **changes: object) -> None:
    """Edit config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unsupported_architecture_names_the_folder(folder: Path) -> None:
    change_config(folder, model_type="gemma", architectures=["GemmaForCausalLM"])
    with pytest.raises(WeightsError, match=r"model: model_type 'gemma'"):
        load_hf(folder)


def test_impossible_shapes_name_the_file(folder: Path) -> None:
    change_config(folder, num_key_value_heads=3)
    with pytest.raises(WeightsError, match=r"config.json: 2 query heads cannot share 3"):
        load_hf(folder)


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match="neither model.safetensors nor .*only safetensors are read"
    ):
        load_hf(folder)


def test_damaged_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        WeightsError, match=r"model\.safetensors is damaged.*it ends before .*model"
    ):
        load_hf(folder)
    (folder / WEIGHTS).write_bytes(b"\x40" + content[1:])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or no safetensors file"):
        load_hf(folder)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or no safetensors file"):
        load_hf(folder)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(folder: Path, number: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = number
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        WeightsError,
        match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight.*not finite",
    ):
        load_hf(folder)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 2, 1), (2, 1, 1)])
def test_every_device_reads_its_own_part_alone(
    model: Qwen, folder: Path, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def part(*args: object) -> np.ndarray:
        read.append(real(*args))
        return read[-1]

    real = weights._Reader.part
    monkeypatch.setattr(weights._Reader, "part", part)
    loaded = load_hf(folder, mesh=mesh_of(*sizes))
    assert_equal(loaded, model)
    state = nnx.to_flat_state(nnx.state(loaded))
    parts = {leaf.get_value().addressable_shards[0].data.shape for _, leaf in state}
    assert {array.shape for array in read} == parts


@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 1, 1)])
def test_large_stacks_are_put_together_layer_by_layer(
    model: Qwen, folder: Path, sizes: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = []

    def by_layers(*args: object) -> jax.Array:
        stacked.append(real(*args))
        return stacked[-1]

    real = weights._by_layers
    monkeypatch.setattr(weights, "_by_layers", by_layers)
    monkeypatch.setattr(weights, "SMALL", 0)
    place = weights._place
    monkeypatch.setattr(weights, "_place", lambda reader, where, _: place(reader, where, 0))
    mesh = None if sizes is None else mesh_of(*sizes)
    assert_equal(load_hf(folder, mesh=mesh), model)
    devices = 1 if mesh is None else mesh.size
    stacks = [name for name in leaves(model) if name.startswith("layers.")]
    assert len(stacked) == devices * len(stacks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_type_that_is_asked_for(model: Qwen, folder: Path, dtype: str) -> None:
    loaded = leaves(load_hf(folder, param_dtype=dtype))
    for name, array in leaves(model).items():
        assert loaded[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(loaded[name], array.astype(jnp.dtype(dtype)), err_msg=name)


def test_all_mismatches_are_named_at_once(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.int8)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError) as error:
        load_hf(folder)
    message = str(error.value)
    for problem in (
        "5 tensors do not fit",
        "missing lm_head.weight [20, 8]",
        "missing model.layers.1.mlp.up_proj.weight [12, 8]",
        "unexpected model.extra [3]",
        "model.norm.weight is [9], expected [8]",
        "model.layers.0.self_attn.q_proj.bias is of type I8",
    ):
        assert problem in message


def test_tied_model_ignores_a_stored_head_and_old_buffers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    save_file(tensors, folder / WEIGHTS)
    change_config(folder, tie_word_embeddings=True)
    assert load_hf(folder).head is None


def test_missing_shard(model: Qwen, tmp_path: Path) -> None:
    save_hf(model, tmp_path / "m", max_shard_bytes=1000)
    next((tmp_path / "m").glob("model-00002-*")).unlink()
    with pytest.raises(
        WeightsError, match="lacks model-00002-of-.*the first of them model.*download it again"
    ):
        load_hf(tmp_path / "m")


def test_swapped_shards_are_named_with_their_tensors(model: Qwen, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_hf(model, folder, max_shard_bytes=1000)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)
    held = sorted(load_file(first))
    with pytest.raises(WeightsError) as error:
        load_hf(folder)
    message = str(error.value)
    assert f"{first} is not the shard that {INDEX} describes" in message
    assert "lacks model.embed_tokens.weight" in message
    for name in held:
        assert f"holds {name}, which {INDEX} has in {second.name}" in message


def test_a_shard_of_another_model(model: Qwen, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_hf(model, folder, max_shard_bytes=1000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    save_file({"model.extra": np.zeros(3, np.float32)}, shard)
    with pytest.raises(WeightsError, match=r"holds model\.extra, which \S+ lacks"):
        load_hf(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_names(folder: Path, index: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(index)
    with pytest.raises(WeightsError, match="has no weight_map of tensor names"):
        load_hf(folder)


def test_index_may_not_point_outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    index = {"weight_map": {"model.norm.weight": f"../{WEIGHTS}"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="points outside its folder"):
        load_hf(folder)


# Nothing is overwritten, and a folder is whole or absent.


def test_foreign_folder_is_not_overwritten(model: Qwen, folder: Path) -> None:
    change_config(folder, producer=None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match="was not written by an export"):
        save_hf(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_hf(model, folder, overwrite=True)
    assert_equal(load_hf(folder), model)


def test_a_file_is_not_overwritten(model: Qwen, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(WeightsError, match="nothing is overwritten"):
        save_hf(model, tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


def test_own_and_empty_folders_are_replaced(model: Qwen, folder: Path, tmp_path: Path) -> None:
    (folder / "stale.txt").write_text("from the export before")
    save_hf(model, folder)
    assert not (folder / "stale.txt").exists()
    (tmp_path / "empty").mkdir()
    save_hf(model, tmp_path / "empty")
    assert_equal(load_hf(tmp_path / "empty"), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


def test_failure_leaves_the_old_folder_and_nothing_else(model: Qwen, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(unfinished: Path) -> None:
        assert (unfinished / WEIGHTS).is_file()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_hf(model, folder, also=fail)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_files_are_part_of_the_folder(model: Qwen, tmp_path: Path) -> None:
    save_hf(model, tmp_path / "m", also=lambda folder: (folder / "r1re.json").write_text("{}"))
    assert (tmp_path / "m" / "r1re.json").read_text() == "{}"


def test_unknown_dtype(model: Qwen, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'int8'; expected one of float32, bfloat16, float16"):
        save_hf(model, tmp_path / "m", dtype="int8")
    assert not list(tmp_path.iterdir())
