"""Weights and configuration of a GGUF file (the format of llama.cpp), dequantised as they are read.

Where GGUF differs from Hugging Face's layout: names; the rows of Llama's query and key projections
are interleaved (pairs of the rotation stand side by side there, in halves here); Llama 3.1's
rotary scaling is a tensor of factors; and whether the head is tied is not said.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, dequantize
from gguf.constants import GGML_QUANT_SIZES
from jax.sharding import Mesh

from r1re_jax.model.config import Family, ModelConfig, RopeScaling
from r1re_jax.model.names import Form
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen
from r1re_jax.model.weights import Index, Stored, WeightsError, fill

SUFFIX = ".gguf"
EXACT = (Kind.F32, Kind.F16, Kind.BF16)
KINDS = (
    *EXACT,
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
)
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Rows of embedding and head that are compared to tell whether they are one matrix, and the cosine
# from which they are: two- and four-bit copies of one keep 0.97 and more, others are near 0.
PROBES, ALIKE = 256, 0.95


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An opened file: its header is read, its tensors are mapped.

    Attributes:
        path: of the file.
        metadata: key -> value, `GGUF.…` for those of the header.
        tensors: name -> tensor.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


class _Checked(GGUFReader):
    """A reader that names the tensors it cannot map; the package's own error names none."""

    def _build_tensors(self, start: int, fields: Sequence[Any]) -> None:
        problems = []
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            name, kind = bytes(name).decode("utf-8", "replace"), int(kind[0])
            if kind not in KINDS:
                known = kind in [one.value for one in Kind]
                called = Kind(kind).name if known else f"number {kind}"
                problems.append(f"{name} has the quantisation {called}")
                continue
            block, size = GGML_QUANT_SIZES[Kind(kind)]
            end = start + int(offset[0]) + int(np.prod(dims)) // block * size
            if end > self.data.nbytes:
                problems.append(f"{name} ends at byte {end} of a file of {self.data.nbytes} bytes")
            if dims.size == 0 or int(dims[0]) % block:
                problems.append(f"{name} has rows of {dims[:1]} numbers, in blocks of {block}")
        if problems:
            read = ", ".join(kind.name for kind in KINDS)
            raise WeightsError(
                f"{len(problems)} tensors cannot be read (quantisations that can be: {read}):\n  "
                + "\n  ".join(problems)
            )
        super()._build_tensors(start, fields)


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Read a file's header and map its tensors.

    Raises:
        WeightsError: no such file, no GGUF file, a damaged or truncated one, or quantisations that
            are not read; tensors are named.
    """
    path = Path(path)
    try:
        reader = _Checked(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise WeightsError(f"{path} is damaged or no GGUF file: {error}") from None
    if reader.byte_order != "I":
        raise WeightsError(f"{path} is in big-endian byte order, which is not read")
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        tensors[tensor.name] = Stored(path.name, shape, _Rows(tensor.data, tensor.tensor_type))
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return GGUFFile(path, metadata, tensors)


def load_gguf(
    file: GGUFFile,
    *,
    dtype: str | jnp.dtype = "float32",
    param_dtype: str | jnp.dtype = "float32",
    remat: Remat = Remat.NONE,
    mesh: Mesh | None = None,
) -> Qwen:
    """Load the model of an opened file; arguments as in `r1re_jax.model.hf.load_hf`.

    Where a tied matrix is stored twice, the head's copy is taken: it is the one that writers keep
    in the finer quantisation.

    Raises:
        WeightsError: another architecture, settings that are not computed, or tensors that do not
            fit, all named.
    """
    config = gguf_config(file)
    tensors = {name: one for name, one in file.tensors.items() if name != ROPE_FACTORS}
    if config.tied and HEAD in tensors:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    if config.family is Family.LLAMA:
        heads = {"attn_q": config.query_heads, "attn_k": config.kv_heads}
        for name, one in tensors.items():
            if count := heads.get(name.split(".")[-2]):
                order = _halves(one.shape[0], count)
                tensors[name] = dataclasses.replace(
                    one, read=dataclasses.replace(one.read, order=order)
                )
    return fill(
        abstract_qwen(config, dtype=dtype, remat=remat),
        tensors,
        form=Form.GGUF,
        source=str(file.path),
        dtype=param_dtype,
        mesh=mesh,
    )


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Read the model's shape from the metadata and, for the head and the scaling, the tensors.

    Raises:
        WeightsError: another architecture, missing keys (all named), rotary scaling that is not
            computed, or shapes that cannot be built.
    """
    family = file.metadata.get("general.architecture")
    if family not in [known.value for known in Family]:
        known = ", ".join(known.value for known in Family)
        raise WeightsError(
            f"{file.path}: the architecture {family!r} is not supported; expected one of {known}"
        )
    keys = {
        "layers": "block_count",
        "width": "embedding_length",
        "mlp_width": "feed_forward_length",
        "query_heads": "attention.head_count",
    }
    shape = {ours: file.metadata.get(f"{family}.{key}") for ours, key in keys.items()}
    missing = [f"{family}.{keys[ours]}" for ours in keys if not isinstance(shape[ours], int)]
    missing += [EMBEDDING] if EMBEDDING not in file.tensors else []
    if missing:
        raise WeightsError(f"{file.path} lacks whole numbers or tensors: {', '.join(missing)}")
    of = lambda key, default: file.metadata.get(f"{family}.{key}") or default  # noqa: E731
    if (scaling := of("rope.scaling.type", "none")) != "none":
        raise WeightsError(f"{file.path}: rotary scaling {scaling!r} is not implemented")
    theta = float(of("rope.freq_base", 10_000.0))
    head_size = of("attention.key_length", shape["width"] // shape["query_heads"])
    try:
        return ModelConfig(
            family=Family(family),
            vocab=file.tensors[EMBEDDING].shape[0],
            **shape,
            kv_heads=of("attention.head_count_kv", shape["query_heads"]),
            head_size=head_size,
            rope_theta=theta,
            rope_scaling=_scaling(file, theta, head_size),
            norm_eps=_as_written(of("attention.layer_norm_rms_epsilon", 1e-6)),
            tied=_tied(file),
            max_position=of("context_length", 2048),
        )
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{file.path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Reads parts of a tensor; a row is quantised by itself, so that others stay untouched.

    Attributes:
        data: rows of bytes, or of numbers where they are not quantised.
        kind: their quantisation.
        order: which row there is row i here; None where they are the same.
    """

    data: np.ndarray
    kind: Kind
    order: np.ndarray | None = None

    def __call__(self, index: Index) -> np.ndarray:
        """Return the part [index] as float32."""
        rows = self.data[index[0] if self.order is None else self.order[index[0]]]
        return dequantize(np.asarray(rows), self.kind)[(slice(None), *index[1:])]


def _halves(rows: int, heads: int) -> np.ndarray:
    """Return which row there is row i here: of each head, first the even ones, then the odd ones.

    llama.cpp rotates neighbours (2j, 2j + 1), we and Hugging Face (j, j + A/2).
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _tied(file: GGUFFile) -> bool:
    """Tell whether head and embedding are one matrix: GGUF does not say, and may hold it twice.

    Copies in types that lose nothing must be equal, to half precision; quantised ones alike.
    """
    if HEAD not in file.tensors:
        return True
    head, embedding = (file.tensors[name] for name in (HEAD, EMBEDDING))
    if head.shape != embedding.shape:
        return False
    step = slice(None, None, max(1, head.shape[0] // PROBES))
    a, b = (one.read((step, slice(None))).astype(np.float64) for one in (head, embedding))
    if head.read.kind in EXACT and embedding.read.kind in EXACT:
        return bool(np.allclose(a, b, rtol=2**-7, atol=1e-7))
    return bool((a * b).sum() > ALIKE * np.sqrt((a * a).sum() * (b * b).sum()))


def _scaling(file: GGUFFile, theta: float, head_size: int) -> RopeScaling | None:
    """Find Llama 3.1's scaling whose factors the file holds: published ones all have these turns.

    Raises:
        WeightsError: other factors.
    """
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = file.tensors[ROPE_FACTORS].read((slice(None),))
    scaling = RopeScaling(
        factor=float(np.round(factors.max(), 3)),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )
    half = head_size // 2
    frequency = theta ** (-np.arange(half) / half)
    if factors.shape != (half,) or not np.allclose(frequency / factors, scaling(frequency), 1e-5):
        raise WeightsError(
            f"{file.path.name}: {ROPE_FACTORS} holds {factors[:4]} … {factors[-1]}; expected the"
            f" {half} factors of Llama 3.1's scaling with turns from 1 to 4 in 8,192 tokens"
        )
    return scaling


def _as_written(number: float) -> float:
    """Return the short decimal that a float32 of a file stands for: 1e-5, not 9.99999975e-06."""
    return float(str(np.float32(number)))
