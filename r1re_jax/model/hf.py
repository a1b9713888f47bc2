"""Weights in and out in Hugging Face's layout: one table of names for all families, both ways.

Only JSON and safetensors are read or written: nothing in a folder can run code. Import needs
neither torch nor transformers.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r1re_jax import hosts
from r1re_jax.model.hf_config import (
    PRODUCER,
    WeightsError,
    config_from_hf,
    hf_config,
    hf_generation,
)
from r1re_jax.model.names import NAMES, Form, Name
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen
from r1re_jax.model.weights import Stored, fill

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Tensors that some writers add and that carry nothing: buffers of old transformers.
BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load_hf(
    folder: str | os.PathLike,
    *,
    dtype: str | jnp.dtype = "float32",
    param_dtype: str | jnp.dtype = "float32",
    remat: Remat = Remat.NONE,
    mesh: Mesh | None = None,
) -> Qwen:
    """Load a folder of a known family: config.json and model.safetensors, in one file or shards.

    Args:
        folder: Hugging Face folder; tensors in float32, bfloat16 or float16.
        dtype: what the forward computes in.
        param_dtype: of the parameters, whatever the files hold.
        remat: what the backward pass computes again.
        mesh: where parameters go, by the sharding table; None: the first device.

    Raises:
        WeightsError: no such folder, no or bad config.json, an architecture or file format that is
            not supported, or files and tensors that do not fit, all named in one message.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(
            f"no model folder {folder}: expected one with config.json and {ONE_FILE}"
        )
    try:
        config = config_from_hf(_read_json(folder / "config.json"))
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from None
    except ValueError as error:  # shapes that ModelConfig refuses
        raise WeightsError(f"{folder / 'config.json'}: {error}") from None
    # A tied model's head is its embedding; files that store it twice agree with themselves.
    doubled = {"lm_head.weight"} if config.tied else set()
    with contextlib.ExitStack() as stack:
        return fill(
            abstract_qwen(config, dtype=dtype, remat=remat),
            _open(folder, stack),
            form=Form.HF,
            source=str(folder),
            dtype=param_dtype,
            mesh=mesh,
            ignored=lambda name: name in doubled or bool(BUFFERS.fullmatch(name)),
        )


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise WeightsError(f"{path.name} is missing")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path.name} holds a {type(content).__name__}; expected a JSON object")
    return content


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Map each tensor's name to where it is stored; reads headers only."""
    if (folder / ONE_FILE).is_file():
        return _stored(folder / ONE_FILE, stack)
    if not (folder / INDEX).is_file():
        raise WeightsError(
            f"{folder} has neither {ONE_FILE} nor {INDEX}; only safetensors are read"
        )
    index = _read_json(folder / INDEX).get("weight_map")
    if not (isinstance(index, dict) and all(isinstance(file, str) for file in index.values())):
        raise WeightsError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    files = sorted(set(index.values()))
    if strange := [file for file in files if Path(file).name != file]:
        raise WeightsError(f"{folder / INDEX} points outside its folder: {', '.join(strange)}")
    if absent := [file for file in files if not (folder / file).is_file()]:
        lost = [name for name, file in index.items() if file in absent]
        raise WeightsError(
            f"{folder} lacks {', '.join(absent)}, named by {INDEX}, with {len(lost)} tensors, the"
            f" first of them {lost[0]}; download it again"
        )
    found: dict[str, Stored] = {}
    for file in files:
        tensors = _stored(folder / file, stack)
        _check_shard(folder, file, set(tensors), index)
        found |= tensors
    return found


def _check_shard(folder: Path, file: str, names: set[str], index: Mapping[str, str]) -> None:
    """Refuse a shard that holds other tensors than the index says: swapped, or of another model."""
    said = {name for name, where in index.items() if where == file}
    if names != said:
        problems = [f"lacks {name}" for name in sorted(said - names)]
        problems += [
            f"holds {name}, which {INDEX} "
            + (f"has in {index[name]}" if name in index else "lacks")
            for name in sorted(names - said)
        ]
        raise WeightsError(
            f"{folder / file} is not the shard that {INDEX} describes; download it again:\n  "
            + "\n  ".join(problems)
        )


def _stored(path: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Open a file of safetensors for as long as the stack is; reads its header only."""
    try:
        handle = stack.enter_context(safe_open(path, framework="np"))
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged or no safetensors file: {error}{_cut_off(path)}"
        ) from None
    tensors = {}
    for name in handle.keys():  # noqa: SIM118
        tensor = handle.get_slice(name)
        kind = tensor.get_dtype()
        known = "" if kind in FLOATS else f"is of type {kind}, expected one of {', '.join(FLOATS)}"
        # No index there, `()`, reads a tensor without dimensions.
        tensors[name] = Stored(path.name, tuple(tensor.get_shape()), tensor.__getitem__, known)
    return tensors


def _cut_off(path: Path) -> str:
    """Say which tensors a truncated file lacks, as far as its header is there."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 100_000_000)))
        there = path.stat().st_size - 8 - size
        ends = {name: of["data_offsets"][1] for name, of in header.items() if "data_offsets" in of}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ""
    lost = [name for name, end in ends.items() if end > there]
    return f"; it ends before {', '.join(lost)}" if lost else ""


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
        WeightsError: the folder is in use by something else, or the dtype is not supported.
    """
    folder = Path(folder)
    if dtype not in FLOATS.values():
        raise WeightsError(
            f"cannot save weights as {dtype!r}; expected one of {', '.join(FLOATS.values())}"
        )
    if not overwrite:
        _refuse_foreign(folder)
    writes = hosts.is_first()
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
        raise WeightsError(
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
        for theirs, shape in name.tensors(Form.HF, flat[tuple(name.ours.split("."))].shape)
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
            (folder / files[theirs]).chmod(0o644)  # the library closes its files to others
            shard = {}
    if folder is not None and len(last) > 1:
        total = {"total_size": sum(sizes.values())}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": files})


def _tensors(rows: Sequence[Name], flat: Mapping, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    for name in rows:
        array = hosts.on_host(flat[tuple(name.ours.split("."))].get_value())
        layers = array if name.stacked else array[None]
        for layer, (theirs, _) in zip(layers, name.tensors(Form.HF, array.shape), strict=True):
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
