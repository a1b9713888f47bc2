"""GGUF files of random weights, written as llama.cpp's converter does, and what they hold.

Independent of `r1re_jax.model.gguf_file`: the layout is undone here by loops over heads.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from r1re_jax.model.config import Family, ModelConfig

# Super-blocks of 256 numbers that the package reads and cannot write: bytes, where in them stand
# the half-precision scales, and how large these are for weights of 0.1 or so.
RAW_KINDS = {
    Kind.Q2_K: (84, (80, 82), 5e-3),
    Kind.Q3_K: (110, (108,), 2e-3),
    Kind.Q4_K: (144, (0, 2), 3e-4),
    Kind.Q5_K: (176, (0, 2), 1.5e-4),
    Kind.Q6_K: (210, (208,), 4e-5),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """A file and the float32 tensors that it stands for, by Hugging Face's names."""

    path: Path
    tensors: Mapping[str, np.ndarray]


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Return Hugging Face's names -> GGUF's, from the package's own table."""
    architecture = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}[config.family.value]
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), config.layers)
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj")]
    parts += [f"self_attn.{x}" for x in ("q_norm", "k_norm")]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names += [f"model.layers.{i}.{part}" for i in range(config.layers) for part in parts]
    found = {}
    for name in names:
        for kind in ("weight", "bias"):
            there = table.get_name(f"{name}.{kind}", try_suffixes=(".weight", ".bias"))
            if there is not None:
                found[f"{name}.{kind}"] = there
    return found


def random_blocks(shape: tuple[int, int], kind: Kind, seed: int) -> np.ndarray:
    """Return rows of random super-blocks whose scales are small and finite."""
    size, scales, usual = RAW_KINDS[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    for place in scales:
        scale = random.uniform(usual / 2, usual, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put row j of a head's first half at 2j and of its second half at 2j + 1."""
    out = np.empty_like(rows)
    size = rows.shape[0] // heads
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = rows[head * size + j]
            out[head * size + 2 * j + 1] = rows[head * size + size // 2 + j]
    return out


def parted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleaved`."""
    out = np.empty_like(rows)
    size = rows.shape[0] // heads
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + j] = rows[head * size + 2 * j]
            out[head * size + size // 2 + j] = rows[head * size + 2 * j + 1]
    return out


def as_metadata(
    folder: Path, pre: str, *, eos: str, pad: str, chat_template: str
) -> dict[str, object]:
    """Return a tokenizer.json as llama.cpp's converter writes it: tokens, types, merges, ids."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = dict(content["model"]["vocab"])
    types = dict.fromkeys(ids, 1)
    for token in content["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["content"]] = 3 if token["special"] else 4
    tokens = [f"[PAD{i}]" for i in range(max(ids.values()) + 1)]
    kinds = [5] * len(tokens)
    for text, id in ids.items():
        tokens[id], kinds[id] = text, types[text]
    merges = content["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [p if isinstance(p, str) else " ".join(p) for p in merges],
        "tokenizer.ggml.eos_token_id": ids[eos],
        "tokenizer.ggml.padding_token_id": ids[pad],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template,
    }


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    kind: Kind = Kind.F32,
    kinds: Mapping[str, Kind] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    words: Mapping[str, object] | None = None,
) -> Written:
    """Write float32 tensors, by Hugging Face's names, matrices in the given quantisations.

    Args:
        path: of the file.
        config: of the model.
        tensors: float32, by Hugging Face's names.
        kind: of every matrix.
        kinds: of some matrices, by name.
        extra: float32 tensors by GGUF's names.
        words: metadata of the tokenizer.
    """
    names, kinds = gguf_names(config), kinds or {}
    writer = gguf.GGUFWriter(str(path), config.family.value)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.query_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in (words or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_array)(key, value)
    held = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        part = name.split(".")[-2]
        permuted = config.family is Family.LLAMA and part in ("q_proj", "k_proj")
        heads = config.query_heads if part == "q_proj" else config.kv_heads
        rows = interleaved(tensor, heads) if permuted else tensor
        of = kinds.get(name, kind) if tensor.ndim == 2 else Kind.F32
        if of in RAW_KINDS:
            data = random_blocks(rows.shape, of, number)
        else:
            data = gguf.quantize(rows, of)
        writer.add_tensor(names[name], data, raw_dtype=of)
        read = gguf.dequantize(data, of)
        held[name] = parted(read, heads) if permuted else read
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, held)
