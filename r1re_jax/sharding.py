"""The mesh and the one table that says which mesh axis shards which logical axis."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Mesh axes: `data` runs across slices, `fsdp` shards parameters and batch, `tensor` shards heads
# and MLP.
MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or activation -> mesh axes (None: replicated).
RULES: dict[str, tuple[str, ...] | None] = {
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": None,
    "rank": None,
    "layers": None,
    "guide": None,  # every device needs the whole guide
    "question": ("data", "fsdp"),  # rows of a step are spread over all data-parallel devices
}


def param(value: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
    """Make a parameter that knows the logical names of its axes."""
    return nnx.Param(value, logical_axes=axes)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Translate logical axis names to a PartitionSpec by RULES.

    Raises:
        KeyError: an axis that the table does not list.
    """
    return PartitionSpec(*(RULES[axis] if axis is not None else None for axis in axes))


def question_ways(mesh: Mesh) -> int:
    """Return how many parts the questions of a tree are spread over."""
    return math.prod(mesh.shape[axis] for axis in RULES["question"] or ())


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Make the mesh of some devices, or of all; one size may be −1 and takes those left.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(
            f"mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))}: one may be -1, others ≥ 1"
        )
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        found = dict(zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"a mesh of {found} needs {int(np.prod(sizes))} devices; there are {len(devices)}"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Return the NamedSharding of every parameter of a model state, by its logical axes.

    Stacked layers have one axis more than their logical names: the layers, in front.

    Raises:
        ValueError: some parameters cannot be split evenly over their mesh axes (all are named).
    """
    uneven = []

    def one(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("logical_axes")
        shape = variable.get_value().shape
        layout = NamedSharding(mesh, spec(("layers",) * (len(shape) - len(axes)) + tuple(axes)))
        try:
            layout.shard_shape(shape)
        except ValueError:
            uneven.append(f"{jax.tree_util.keystr(path)} {list(shape)} as {layout.spec}")
        return variable.replace(layout)

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    result = jax.tree_util.tree_map_with_path(one, state, is_leaf=is_variable)
    if uneven:
        raise ValueError(
            f"a mesh of {dict(mesh.shape)} does not divide {len(uneven)} parameters evenly:"
            f" {'; '.join(uneven)}. Choose mesh sizes that divide them"
        )
    return result
