"""Where a policy is: what a name means, which checkpoint of a run, and its parameters."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from r1re_jax import sharding
from r1re_jax.files import absolute, children, is_remote, place, read_text
from r1re_jax.model.gguf_file import SUFFIX
from r1re_jax.model.lora import Lora
from r1re_jax.model.qwen import Qwen
from r1re_jax.published import PUBLISHED, cached

BASE = "base:"
# Parts of a work directory: all of the policy but its weights, and the weights.
WORDS, CHECKPOINTS = "policy", "checkpoints"
# Beside the words, where checkpoints hold an adapter: of which base.
ADAPTED = "lora.json"
# Orbax's mark that a checkpoint in a bucket is whole; on this machine it renames instead.
COMMITTED = "commit_success.txt"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


class PolicyError(ValueError):
    """A policy that cannot be found, read or asked what it was asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """What the adapter of a LoRA run belongs to; `lora.json` of a work directory's words.

    Attributes:
        base: what `load_policy` opens: a name, or an absolute path.
        step: of the base, where that is a work directory.
        dtype: that the run holds the base in.
        fingerprint: of the base's parameters in that type (`r1re_jax.model.fingerprint`).
        lora: rank, alpha and targets of the adapter.
    """

    base: str
    step: int | None
    dtype: str
    fingerprint: str
    lora: Lora

    def check(self, found: str) -> None:
        """Raise PolicyError where the base that was found has another fingerprint."""
        if found != self.fingerprint:
            step = "" if self.step is None else f", step {self.step}"
            raise PolicyError(
                f"{self.base}{step} is not the base that this run's adapter was trained on: the"
                f" fingerprint of its weights is {found[:12]}…, not {self.fingerprint[:12]}…. Put"
                f" the old weights back, or say in {WORDS}/{ADAPTED} where they are"
            )


def read_adapted(workdir: epath.Path) -> Adapted | None:
    """Return what a work directory says of its adapter's base; None where it has no adapter.

    Raises:
        PolicyError: the file cannot be used.
    """
    path = workdir / WORDS / ADAPTED
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        return Adapted(**{**content, "lora": Lora(**content["lora"])})
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{path} cannot be used: {error!r}") from None


def is_workdir(where: epath.Path) -> bool:
    """Whether a folder is a work directory of a run."""
    return (where / CHECKPOINTS).is_dir() or (where / WORDS).is_dir()


def lasting(source: str | os.PathLike) -> str:
    """Return a source by which it is found from any folder: names as they are, paths absolute."""
    name = os.fspath(source)
    local = not name.startswith(BASE) and not is_remote(name) and Path(name).exists()
    return str(Path(name).absolute()) if local else name


def find(source: str | os.PathLike) -> epath.Path:
    """Return the folder, or the GGUF file, that a source (of `load_policy`) means.

    Raises:
        PolicyError: there is none; the message says what was looked for.
        FetchError: a published policy that is not in the cache, with the command that fetches it.
        PlaceError: a bucket that cannot be reached.
    """
    name, folder = os.fspath(source), place(source)
    if name.startswith(BASE):
        folder = place(Path(__file__).parent / "base" / name.removeprefix(BASE))
        if folder.is_dir():
            return folder
        there = sorted(path.name for path in children(folder.parent) if path.is_dir())
        raise PolicyError(f"no base policy {name!r}; there are {[BASE + each for each in there]}")
    if folder.is_dir() or (folder.is_file() and folder.suffix == SUFFIX):
        return folder
    if folder.exists():
        raise PolicyError(
            f"{folder} is a file; expected a {SUFFIX} file, or a folder: Hugging Face's with"
            " safetensors, or a run's"
        )
    if name in PUBLISHED:
        return place(cached(name))
    looked = (
        f"no policy {name!r}: no folder or {SUFFIX} file {absolute(folder)}, no {BASE}NAME, and"
        f" not one of {', '.join(PUBLISHED)}"
    )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise PolicyError(looked)
    try:
        from huggingface_hub import snapshot_download

        return place(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # whatever failed there: offline, no such name, no access
        raise PolicyError(f"{looked}, and the hub has not given it: {error}") from error


def saved_steps(workdir: epath.Path) -> list[int]:
    """Return the steps of all checkpoints that are whole, ascending."""
    found = (path for path in children(workdir / CHECKPOINTS) if path.name.isdigit())
    return sorted(int(path.name) for path in found if is_whole(path))


def is_whole(checkpoint: epath.Path) -> bool:
    """Whether Orbax has finished what is there of a checkpoint."""
    return (checkpoint / COMMITTED).exists() if is_remote(checkpoint) else checkpoint.is_dir()


def choose_step(workdir: epath.Path, step: int | None) -> int:
    """Return the step to load: the one asked for, else the best, else the newest.

    The newest checkpoint says how all steps scored.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise PolicyError(f"{workdir} has no checkpoint yet in {CHECKPOINTS}/")
    if step is not None and step not in steps:
        raise PolicyError(f"{workdir} has no checkpoint of step {step}; there are {steps}")
    if step is not None:
        return step
    meta = read_json(workdir / CHECKPOINTS / str(steps[-1]) / "meta" / "metadata")
    scores = meta.get("scores", {})
    scored = [step for step in steps if str(step) in scores]
    return max(scored, key=lambda step: (scores[str(step)], -step), default=steps[-1])


def restore(
    model: Qwen,
    folder: epath.Path,
    *,
    dtype: str | jnp.dtype = "float32",
    mesh: Mesh | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, jax.Array]:
    """Read a checkpoint's `params`: dotted name -> array, as `dtype`.

    Args:
        model: of shapes.
        folder: the checkpoint's `params`.
        dtype: of the result.
        mesh: where parameters go, by the sharding table; None: the first device.
        wanted: which of the model's parameters the checkpoint holds.

    Raises:
        PolicyError: it holds others.
    """
    import orbax.checkpoint as ocp

    state = nnx.state(model)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    places = dict.fromkeys(flat, SingleDeviceSharding(jax.devices()[0]))
    if mesh is not None:
        spread = nnx.to_flat_state(sharding.parameter_shardings(state, mesh))
        places = {".".join(map(str, path)): leaf.get_value() for path, leaf in spread}
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=places[name])
        for name, leaf in flat.items()
        if wanted(name)
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(absolute(folder), target)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise PolicyError(
            f"{folder} does not hold the parameters of its policy: {error}"
        ) from error


def named_params(model: Qwen) -> dict[str, jax.Array]:
    """Return a model's parameters: dotted name -> array."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def filled(model: Qwen, params: Mapping[str, jax.Array]) -> Qwen:
    """Return a model of shapes with arrays, dotted name -> array, in their place."""
    graph, state = nnx.split(model)
    flat = [
        (path, leaf.replace(params[".".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """Read a JSON object, or raise PolicyError."""
    try:
        content = json.loads(read_text(epath.Path(path)))
    except FileNotFoundError:
        raise PolicyError(f"{path} is missing") from None
    except ValueError as error:
        raise PolicyError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise PolicyError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content
