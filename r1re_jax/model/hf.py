"""Weights in and out in Hugging Face's layout: one table of names for all families, both ways.

Only JSON and safetensors are read or written: nothing in a folder can run code. Import needs
neither torch nor transformers.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r1re_jax import sharding
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.hf_config import PRODUCER, HFError, config_from_hf, hf_config, hf_generation
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Name:
    """One row of the table: a parameter here and there.

    Attributes:
        ours: dotted path in the Qwen module; `layers.…` are stacked [L, …].
        theirs: tensor name there; `{}` stands for the layer's number.
        transposed: whether their tensor is [out, in] where ours is [in, out].
    """

    ours: str
    theirs: str
    transposed: bool = False


# A family has the rows whose parameters its config makes (biases, norms of q and k, a head).
# torch keeps a linear layer's weight as [out, in], we as [in, out].
NAMES: tuple[Name, ...] = (
    Name("embed", "model.embed_tokens.weight"),
    Name("layers.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    Name("layers.query.weight", "model.layers.{}.self_attn.q_proj.weight", transposed=True),
    Name("layers.query.bias", "model.layers.{}.self_attn.q_proj.bias"),
    Name("layers.key.weight", "model.layers.{}.self_attn.k_proj.weight", transposed=True),
    Name("layers.key.bias", "model.layers.{}.self_attn.k_proj.bias"),
    Name("layers.value.weight", "model.layers.{}.self_attn.v_proj.weight", transposed=True),
    Name("layers.value.bias", "model.layers.{}.self_attn.v_proj.bias"),
    Name("layers.query_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    Name("layers.key_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    Name("layers.output.weight", "model.layers.{}.self_attn.o_proj.weight", transposed=True),
    Name("layers.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    Name("layers.gate.weight", "model.layers.{}.mlp.gate_proj.weight", transposed=True),
    Name("layers.up.weight", "model.layers.{}.mlp.up_proj.weight", transposed=True),
    Name("layers.down.weight", "model.layers.{}.mlp.down_proj.weight", transposed=True),
    Name("norm.weight", "model.norm.weight"),
    Name("head", "lm_head.weight", transposed=True),  # absent where the head is tied
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file's name, and what reads parts of it (a safetensors slice)."""

    file: str
    read: Any


# Tensors that some writers add and that carry nothing: buffers of old transformers.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load_hf(
    folder: str | os.PathLike,
    *,
    dtype: str | jnp.dtype = "float32",
    remat: Remat = Remat.NONE,
    mesh: Mesh | None = None,
) -> Qwen:
    """Load a folder of a known family: config.json and model.safetensors, in one file or shards.

    Args:
        folder: Hugging Face folder; tensors in float32, bfloat16 or float16.
        dtype: what the forward computes in; parameters are fp32 whatever the files hold.
        remat: what the backward pass computes again.
        mesh: where given, each parameter is placed on it by the sharding table as it is read.

    Raises:
        HFError: no such folder, no or bad config.json, an architecture or file format that is not
            supported, or tensors that are missing, unexpected, mis-shaped or not of a float type,
            all named in one message.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HFError(f"no model folder {folder}: expected one with config.json and {ONE_FILE}")
    try:
        config = config_from_hf(_read_json(folder / "config.json"))
    except HFError as error:
        raise HFError(f"{folder}: {error}") from None
    except ValueError as error:  # shapes that ModelConfig refuses
        raise HFError(f"{folder / 'config.json'}: {error}") from None
    graph, state = nnx.split(abstract_qwen(config, dtype=dtype, remat=remat))
    placement = (
        None if mesh is None else nnx.to_flat_state(sharding.parameter_shardings(state, mesh))
    )
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(folder, config, state, tensors)
        loaded = []
        for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
            where = None if placement is None else placement[i][1].get_value()
            array = _place(_name(path), variable.shape, tensors, where)
            loaded.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise HFError(f"{path.name} is missing")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise HFError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise HFError(f"{path.name} holds a {type(content).__name__}; expected a JSON object")
    return content


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Map each tensor's name to where it is stored; reads headers only."""
    if (folder / ONE_FILE).is_file():
        files = [ONE_FILE]
    elif (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        if strange := [file for file in files if Path(file).name != file]:
            raise HFError(f"{folder / INDEX} points outside its folder: {', '.join(strange)}")
        if absent := [file for file in files if not (folder / file).is_file()]:
            raise HFError(
                f"{folder} lacks {', '.join(absent)}, named by {INDEX}; download it again"
            )
    else:
        raise HFError(f"{folder} has neither {ONE_FILE} nor {INDEX}; only safetensors are read")
    found = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="np"))
        except SafetensorError as error:
            raise HFError(f"{folder / file} is damaged or no safetensors file: {error}") from None
        found |= {name: Stored(file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118
    return found


def _name(path: tuple) -> Name:
    """Return the table's row of one of our parameters."""
    ours = ".".join(map(str, path))
    return next(name for name in NAMES if name.ours == ours)


def _theirs(name: Name, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors there that make up our parameter of the given shape."""
    stacked = "{}" in name.theirs
    inner = shape[1:] if stacked else shape
    inner = inner[::-1] if name.transposed else inner
    return [(name.theirs.format(i), inner) for i in range(shape[0] if stacked else 1)]


def _check(
    folder: Path, config: ModelConfig, state: nnx.State, tensors: Mapping[str, Stored]
) -> None:
    """Raise one error that names every tensor which does not fit."""
    expected = {
        theirs: shape
        for path, variable in nnx.to_flat_state(state)
        for theirs, shape in _theirs(_name(path), variable.shape)
    }
    # A tied model's head is its embedding; files that store it twice agree with themselves.
    ignored = {"lm_head.weight"} if config.tied else set()
    problems = [
        f"missing {name} {list(expected[name])}" for name in expected if name not in tensors
    ]
    for name, stored in sorted(tensors.items()):
        tensor = stored.read
        if name not in expected:
            if name not in ignored and not IGNORED.fullmatch(name):
                problems.append(f"unexpected {name} {tensor.get_shape()}")
        elif tuple(tensor.get_shape()) != expected[name]:
            problems.append(f"{name} is {tensor.get_shape()}, expected {list(expected[name])}")
        elif tensor.get_dtype() not in FLOATS:
            problems.append(
                f"{name} is of type {tensor.get_dtype()}, expected one of {', '.join(FLOATS)}"
            )
    if problems:
        raise HFError(
            f"{folder}: {len(problems)} tensors do not fit config.json:\n  " + "\n  ".join(problems)
        )


def _place(
    name: Name,
    shape: tuple[int, ...],
    tensors: Mapping[str, Stored],
    where: jax.sharding.Sharding | None,
) -> jax.Array:
    """Read one of our parameters in fp32, every device's part by itself: never the whole of it."""
    if where is None:
        return jnp.asarray(_part(name, shape, tensors, (slice(None),) * len(shape)))
    # Neighbours that hold the same part read it once; more than one part is never kept.
    read = functools.lru_cache(1)(lambda *bounds: _part(name, shape, tensors, _slices(bounds)))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return read(*(one.indices(size)[:2] for one, size in zip(index, shape, strict=True)))

    # One device after the other: `make_array_from_callback` would hold all parts beside the array.
    places = where.addressable_devices_indices_map(shape).items()
    parts = [jax.block_until_ready(jax.device_put(part(index), device)) for device, index in places]
    return jax.make_array_from_single_device_arrays(shape, where, parts)


def _slices(bounds: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*one) for one in bounds)


def _part(
    name: Name, shape: tuple[int, ...], tensors: Mapping[str, Stored], index: tuple[slice, ...]
) -> np.ndarray:
    """Read the part [index] of one of our parameters, in fp32.

    Raises:
        HFError: a number in it is not finite.
    """
    chosen = [range(*one.indices(size)) for one, size in zip(index, shape, strict=True)]
    array = np.empty([len(one) for one in chosen], np.float32)
    stacked = "{}" in name.theirs
    inner = tuple(slice(one.start, one.stop) for one in (chosen[1:] if stacked else chosen))
    inner = inner[::-1] if name.transposed else inner
    for row, layer in zip(
        array if stacked else [array], chosen[0] if stacked else [0], strict=True
    ):
        theirs = name.theirs.format(layer)
        tensor = tensors[theirs].read[inner]
        row[...] = tensor.T if name.transposed else tensor
        if not np.isfinite(row).all():
            raise HFError(
                f"{tensors[theirs].file}: {theirs} holds numbers that are not finite; the file is"
                " damaged, or its training diverged"
            )
    return array


def save_hf(
    model: Qwen,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that transformers loads: safetensors, config.json and generation_config.json.

    All is written beside the folder and renamed into place at the end, so that a folder of this
    name is always whole. Every process of a multi-host run must call this; the first one writes.

    Args:
        model: its parameters may be sharded over devices and hosts.
        folder: may exist if it is empty or was written by this function.
        dtype: float32, bfloat16 or float16.
        stop_ids: ids that end a completion.
        pad_id: id of the padding token.
        bos_id: id of the token that begins a text.
        max_shard_bytes: above it the weights go into several files with an index.
        overwrite: replace the folder whatever it holds.
        also: called with the unfinished folder before the rename, to add files (tokenizer, …).

    Raises:
        HFError: the folder is in use by something else, or the dtype is not supported.
    """
    folder = Path(folder)
    if dtype not in FLOATS.values():
        raise HFError(
            f"cannot save weights as {dtype!r}; expected one of {', '.join(FLOATS.values())}"
        )
    if not overwrite:
        _refuse_foreign(folder)
    writes = jax.process_index() == 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = (
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) if writes else None
    )
    try:
        _write_weights(model, beside, dtype=dtype, max_shard_bytes=max_shard_bytes)
        if beside is not None:
            ids = {"stop_ids": stop_ids, "pad_id": pad_id, "bos_id": bos_id}
            config = hf_config(model.config, dtype=dtype, **ids)
            _write_json(beside / "config.json", config)
            _write_json(beside / "generation_config.json", hf_generation(config))
            if also is not None:
                also(beside)
            beside.chmod(0o755)  # mkdtemp's folders are closed to others
            _move(beside, folder)
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    """Raise unless the folder is absent, empty or one of our exports."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    if not (config.is_file() and _read_json(config).get("producer") == PRODUCER):
        raise HFError(
            f"{folder} exists and was not written by an export: nothing is overwritten."
            " Choose another folder, or pass overwrite=True"
        )


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _move(beside: Path, folder: Path) -> None:
    """Put the finished folder in place of the old one, which is removed last."""
    old = None
    if folder.exists():
        old = beside.with_name(beside.name + ".old")
        folder.rename(old)
    beside.rename(folder)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _write_weights(model: Qwen, folder: Path | None, *, dtype: str, max_shard_bytes: int) -> None:
    """Write the tensors in the table's order, shard by shard; one shard at most is in memory."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    rows = [name for name in NAMES if tuple(name.ours.split(".")) in flat]
    sizes = {
        theirs: int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        for name in rows
        for theirs, shape in _theirs(name, flat[tuple(name.ours.split("."))].shape)
    }
    files = _plan(sizes, max_shard_bytes)
    last = {file: theirs for theirs, file in files.items()}
    shard: dict[str, np.ndarray] = {}
    for theirs, tensor in _tensors(rows, flat, dtype):
        if folder is None:
            continue  # another process writes; this one only takes part in gathering
        shard[theirs] = tensor
        if last[files[theirs]] == theirs:
            save_file(shard, folder / files[theirs], metadata={"format": "pt"})
            shard = {}
    if folder is not None and len(last) > 1:
        total = {"total_size": sum(sizes.values())}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": files})


def _tensors(rows: Sequence[Name], flat: Mapping, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    for name in rows:
        value = flat[tuple(name.ours.split("."))].get_value()
        if not value.is_fully_addressable:  # pragma: no cover: several hosts
            value = multihost_utils.process_allgather(value, tiled=True)
        array = np.asarray(value)
        layers = array if "{}" in name.theirs else array[None]
        for layer, (theirs, _) in zip(layers, _theirs(name, array.shape), strict=True):
            tensor = layer.T if name.transposed else layer
            yield theirs, np.ascontiguousarray(tensor.astype(jnp.dtype(dtype)))


def _plan(sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """Assign each tensor to a file: consecutive ones together while they stay under the limit."""
    number, filled = 0, 0
    numbers = {}
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    if number == 0:
        return dict.fromkeys(sizes, ONE_FILE)
    return {
        name: f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" for name, i in numbers.items()
    }
