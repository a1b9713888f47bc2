"""GGUF files: names, shards, and what is refused, by file and tensor; parity is in tests/parity."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind

from r1re_jax.model import gguf_file
from r1re_jax.model.config import Family, ModelConfig
from r1re_jax.model.gguf_file import KINDS, gguf_config, load_gguf, open_gguf
from r1re_jax.model.names import NAMES, Form
from r1re_jax.model.qwen import abstract_qwen
from r1re_jax.model.weights import WeightsError
from tests.drawn import drawn_model, drawn_tensors
from tests.gguf_files import gguf_names, write_gguf
from tests.train.world import mesh_of

CONFIG = ModelConfig(
    family=Family.LLAMA,
    vocab=40,
    layers=2,
    width=32,
    query_heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=64,
    rope_theta=1e4,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a sound file's bytes."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(path, CONFIG, drawn_tensors(CONFIG), kind=Kind.Q8_0).path.read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    """Return a file that the test may damage."""
    (tmp_path / "m.gguf").write_bytes(whole)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("family", list(Family))
def test_the_table_has_the_names_of_the_gguf_package(family: Family) -> None:
    config = ModelConfig(**{**CONFIG.__dict__, "family": family})
    theirs = gguf_names(config)
    parameters = [
        ".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(abstract_qwen(config)))
    ]
    for name in NAMES:
        if name.ours in parameters:
            for layer in range(config.layers if name.stacked else 1):
                assert theirs[name.theirs(Form.HF, layer)] == name.theirs(Form.GGUF, layer)


def test_float32_is_read_as_it_is(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf", CONFIG, drawn_tensors(CONFIG), kind=Kind.F32)
    loaded = nnx.to_flat_state(nnx.state(load_gguf(open_gguf(written.path))))
    drawn = dict(nnx.to_flat_state(nnx.state(drawn_model(CONFIG))))
    for name, ours in loaded:
        np.testing.assert_array_equal(ours.get_value(), drawn[name].get_value(), str(name))


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 2, 1)])
def test_shards_are_the_parts_of_the_whole(path: Path, sizes: tuple[int, int, int]) -> None:
    file = open_gguf(path)
    spread = nnx.to_flat_state(nnx.state(load_gguf(file, mesh=mesh_of(*sizes))))
    for (name, one), (_, whole) in zip(
        spread, nnx.to_flat_state(nnx.state(load_gguf(file))), strict=True
    ):
        np.testing.assert_array_equal(one.get_value(), whole.get_value(), err_msg=str(name))
    query = dict(spread)[("layers", "query", "weight")].get_value()
    assert query.addressable_shards[0].data.size == query.size // (sizes[1] * sizes[2])


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model, and long enough to hold a header")
    with pytest.raises(WeightsError, match=r"m\.gguf is damaged or no GGUF file: GGUF magic"):
        open_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"m\.gguf is damaged or no GGUF file"):
        open_gguf(tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match=r"absent\.gguf is damaged or no GGUF file: .*No such"):
        open_gguf(tmp_path / "absent.gguf")


def test_a_truncated_file_names_the_tensors_it_lacks(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:-2000])
    with pytest.raises(WeightsError) as error:
        open_gguf(path)
    lost = re.findall(r"(\S+) ends at byte \d+ of a file of (\d+) bytes", str(error.value))
    assert str(path) in str(error.value)
    assert [name for name, _ in lost][-1] == "output_norm.weight"
    assert {int(size) for _, size in lost} == {len(whole) - 2000}


@pytest.mark.parametrize("share", [0.001, 0.01, 0.03])
def test_a_file_cut_within_its_header(path: Path, whole: bytes, share: float) -> None:
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=r"m\.gguf"):
        open_gguf(path)


@pytest.mark.parametrize(("code", "called"), [(97, "number 97"), (16, "IQ2_XXS"), (24, "I8")])
def test_unknown_quantisations_are_refused_by_tensor(path: Path, code: int, called: str) -> None:
    field = next(
        one.field for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_up.weight"
    )
    content = bytearray(path.read_bytes())
    # Behind a tensor's name (8 + n bytes), number of dimensions (4) and sizes (8 each).
    place = field.offset + 8 + len("blk.1.ffn_up.weight") + 4 + 16
    content[place : place + 4] = code.to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError) as error:
        open_gguf(path)
    message = str(error.value)
    assert f"blk.1.ffn_up.weight has the quantisation {called}" in message
    assert str(path) in message and all(kind.name in message for kind in KINDS)


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    tensors = drawn_tensors(CONFIG)
    damaged = tensors["model.layers.1.mlp.down_proj.weight"].copy()
    damaged[3, 2] = np.nan
    tensors["model.layers.1.mlp.down_proj.weight"] = damaged
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, kind=Kind.F16).path
    with pytest.raises(WeightsError, match=r"m\.gguf: blk\.1\.ffn_down\.weight.*not finite"):
        load_gguf(open_gguf(path))


def test_all_tensors_that_do_not_fit_are_named_at_once(tmp_path: Path) -> None:
    tensors = drawn_tensors(CONFIG)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    extra = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, extra=extra).path
    with pytest.raises(WeightsError) as error:
        load_gguf(open_gguf(path))
    for problem in (
        "3 tensors do not fit",
        "missing blk.0.ffn_up.weight [64, 32]",
        "output_norm.weight is [31], expected [32]",
        "m.gguf: unexpected blk.0.attn_q.bias [32]",
    ):
        assert problem in str(error.value)


def changed(path: Path, **metadata: object) -> gguf_file.GGUFFile:
    """Return the file as if its metadata were other; None takes a key away."""
    file = open_gguf(path)
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    merged = {k: v for k, v in {**file.metadata, **keys}.items() if v is not None}
    return gguf_file.GGUFFile(file.path, merged, file.tensors)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"general__architecture": "gemma"}, r"architecture 'gemma'.*one of qwen2, qwen3, llama"),
        ({"llama__block_count": None}, "lacks whole numbers or tensors: llama.block_count"),
        ({"llama__attention__head_count": [4, 4]}, "lacks .*llama.attention.head_count"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary scaling 'yarn' is not implemented"),
        ({"llama__attention__head_count_kv": 3}, "4 query heads cannot share 3"),
        ({"llama__attention__head_count_kv": [2, 2]}, r"m\.gguf: "),
    ],
)
def test_settings_that_are_not_computed(
    path: Path, metadata: dict[str, object], error: str
) -> None:
    with pytest.raises(WeightsError, match=error):
        gguf_config(changed(path, **metadata))


def test_what_the_metadata_leaves_out_has_llama_cpps_defaults(path: Path) -> None:
    file = changed(
        path,
        llama__rope__freq_base=None,
        llama__attention__key_length=None,
        llama__attention__head_count_kv=None,
    )
    config = gguf_config(file)
    assert (config.rope_theta, config.head_size, config.kv_heads) == (1e4, 8, 4)


def test_other_factors_than_llama31s_are_refused(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.array([1, 1, 2, 3], np.float32)}
    path = write_gguf(tmp_path / "m.gguf", CONFIG, drawn_tensors(CONFIG), extra=extra).path
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight holds .*expected the 4 factors"):
        gguf_config(open_gguf(path))
