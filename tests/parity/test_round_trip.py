"""Folders that transformers wrote, imported and exported in their type: the same, byte by byte."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from r1re_jax.model.config import Family, ModelConfig
from r1re_jax.model.hf import hf_config, load_hf, save_hf
from tests.drawn import small_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DTYPES = ["float32", "bfloat16", "float16"]
# Bits of the exponent, all of which are set in what is not finite; and the integers of that width.
EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
WIDTH = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


def network(config: ModelConfig, dtype: str) -> "torch.nn.Module":
    """A random network there, its norms and biases drawn too."""
    torch.manual_seed(0)
    there = transformers.AutoConfig.for_model(**hf_config(config, dtype=dtype))
    made = transformers.AutoModelForCausalLM.from_config(there, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> type, shape and bytes of every tensor in a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, content in deserialize(path.read_bytes()):
            found[name] = (content["dtype"], content["shape"], bytes(content["data"]))
    return found


def again(folder: Path, dtype: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Import a folder, export it, and return what that holds."""
    save_hf(load_hf(folder), folder.parent / "ours", dtype=dtype)
    return tensors(folder.parent / "ours")


def assert_same(found: dict, expected: dict) -> None:
    """Compare names first, then each tensor, so that a failure names one and prints no bytes."""
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", Family)
def test_every_tensor_comes_back(family: Family, tied: bool, dtype: str, tmp_path: Path) -> None:
    made = network(small_config(family=family, tied=tied), dtype)
    made.save_pretrained(tmp_path / "theirs")
    expected = tensors(tmp_path / "theirs")
    # A tied head is the embedding, and neither side writes it twice.
    assert ("lm_head.weight" in expected) is not tied
    assert_same(again(tmp_path / "theirs", dtype), expected)


def test_shards_come_back_whole(tmp_path: Path) -> None:
    made = network(small_config(), "bfloat16")
    made.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert_same(again(tmp_path / "theirs", "bfloat16"), tensors(tmp_path / "theirs"))


def test_a_tied_head_that_was_stored_twice_is_left_out(tmp_path: Path) -> None:
    """Right, since config.json says that the embedding is the head: all readers tie them."""
    made = network(small_config(tied=True), "float32")
    made.save_pretrained(tmp_path / "theirs")
    expected = tensors(tmp_path / "theirs")
    doubled = {name: value.contiguous().clone() for name, value in made.state_dict().items()}
    assert "lm_head.weight" in doubled
    from safetensors.torch import save_file

    save_file(doubled, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    assert_same(again(tmp_path / "theirs", "float32"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_bit_pattern_survives(dtype: str, tmp_path: Path) -> None:
    """All of the half types; of float32 a random million, the smallest and largest of each sign."""
    kind, exponent = WIDTH[dtype], EXPONENT[dtype]
    if dtype == "float32":
        sign = np.array([0, 0x80000000], np.uint32)
        edges = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF], np.uint32)
        some = np.random.default_rng(0).integers(0, 2**32, 2**20, np.uint32)
        some[:10] = (sign[:, None] | edges[None, :]).ravel()
        bits = np.where(some & exponent == exponent, some & ~kind(exponent), some)
    else:
        bits = np.arange(2**16, dtype=kind)
        bits = bits[bits & exponent != exponent]
    config = small_config(vocab=bits.size // 16)
    made = network(config, dtype)
    with torch.no_grad():
        pattern = torch.from_numpy(bits.reshape(-1, 16)).view(getattr(torch, dtype))
        made.get_input_embeddings().weight.copy_(pattern)
    made.save_pretrained(tmp_path / "theirs")
    expected = tensors(tmp_path / "theirs")
    assert expected["model.embed_tokens.weight"][2] == bits.tobytes()
    assert_same(again(tmp_path / "theirs", dtype), expected)
