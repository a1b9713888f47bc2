"""The mesh and the one table that says which mesh axes shard which logical axis."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Mesh axes: `data` runs across slices, `fsdp` shards parameters and batch, `sequence` parameters
# and the positions of a row, `tensor` heads and MLP.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")
AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Mesh axes of a logical axis; empty where every device holds all of it.

    Attributes:
        training: as parameters are held, their moments and gradients.
        drawing: as the copy lies that completions are drawn with: a token's weights are used where
            they are, for few rows, so that what moves is the rows and not the weights.
    """

    training: tuple[str, ...] = ()
    drawing: tuple[str, ...] = ()


# Logical axis of a parameter or activation -> where it lies.
RULES: Mapping[str, Rule] = {
    "vocab": Rule(("tensor",), ("tensor", "fsdp", "sequence")),
    "embed": Rule(("fsdp", "sequence"), ()),
    "heads": Rule(("tensor",), ("tensor",)),
    "kv_heads": Rule(("tensor",), ("tensor",)),
    "mlp": Rule(("tensor",), ("tensor", "fsdp")),
    "norm": Rule(),
    "rank": Rule(),
    "layers": Rule(),
    "guide": Rule(),  # every device needs the whole guide
    # Rows of a step are spread over all data-parallel devices.
    "question": Rule(("data", "fsdp"), ("data", "fsdp")),
    # Positions of a level's rows; drawing has one of each row at a time (`drawing_mesh`).
    "position": Rule(("sequence",), ()),
    # Where logits are computed the devices of a slice share the vocabulary instead.
    "scored": Rule(("data",), ("data",)),
}


# Memory of the host that the devices read from: for arrays that few programs need.
HOST = "pinned_host"


def on_host(where: NamedSharding) -> NamedSharding:
    """Return the sharding with its shards in the host's memory, each beside its device."""
    return where.with_memory_kind(HOST)


def on_device(tree: Any) -> Any:
    """Bring arrays that lie in the host's memory to their devices, within a program."""

    def move(x: jax.Array) -> jax.Array:
        if jax.typeof(x).memory_space == jax.memory.Space.Host:
            # Else XLA's TPU compiler moves copies past reshapes, and fails at some.
            return jax.lax.optimization_barrier(jax.device_put(x, jax.memory.Space.Device))
        return x

    return jax.tree.map(move, tree)


def param(value: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
    """Make a parameter that knows the logical names of its axes."""
    return nnx.Param(value, logical_axes=axes)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Translate logical axis names to a PartitionSpec by RULES.

    Raises:
        KeyError: an axis that the table does not list.
    """
    return PartitionSpec(*((RULES[axis].training or None) if axis else None for axis in axes))


def question_ways(mesh: Mesh) -> int:
    """Return how many parts the questions of a tree are spread over."""
    return math.prod(mesh.shape[axis] for axis in RULES["question"].training)


def shares_positions(mesh: Mesh | None, tokens: int) -> bool:
    """Whether the positions of a level's rows are spread: among several devices, and evenly."""
    ways = 1 if mesh is None else mesh.shape["sequence"]
    return ways > 1 and tokens % ways == 0


def drawing_mesh(mesh: Mesh, *, tensor: int = 0) -> Mesh:
    """Return the mesh that completions are drawn on: the same devices in the same order.

    Devices that share the positions of a row in training share the rows there.

    Args:
        mesh: that of training.
        tensor: devices that share the heads of a row; 0 for as many as in training.

    Raises:
        ValueError: the devices of a slice cannot be shared out so.
    """
    data, fsdp, sequence, ways = (mesh.shape[axis] for axis in MESH_AXES)
    tensor = tensor or ways
    if (sequence, tensor) == (1, ways):
        return mesh
    shared = fsdp * sequence * ways
    if shared % tensor:
        below = max(size for size in range(1, tensor) if shared % size == 0)
        raise ValueError(
            f"mesh.drawing_tensor is {tensor}; it must divide the {shared} devices of"
            f" mesh.fsdp={fsdp} times mesh.sequence={sequence} times mesh.tensor={ways}, as {below}"
            " does"
        )
    devices = mesh.devices.reshape(data, -1, 1, tensor)
    return Mesh(devices, MESH_AXES, axis_types=AXIS_TYPES)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Make the mesh of some devices, or of all; one size may be −1 and takes those left.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, sequence, tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(
            f"mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))}: one may be -1, others ≥ 1"
        )
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        found = dict(zip(MESH_AXES, sizes, strict=True))
        near = _nearest(sizes, len(devices), lambda other: True)
        raise ValueError(
            f"a mesh of {found} needs {math.prod(sizes)} devices; there are {len(devices)}, for"
            f" which the nearest mesh is {near}"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=AXIS_TYPES, devices=devices)


def parameter_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Return the NamedSharding of every parameter of a model state, by its logical axes.

    Stacked layers have one axis more than their logical names: the layers, in front.

    Raises:
        ValueError: some parameters cannot be split evenly over their mesh axes (all are named).
    """
    uneven, all_of_them = [], []

    def one(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("logical_axes")
        shape = variable.get_value().shape
        layout = NamedSharding(mesh, spec(("layers",) * (len(shape) - len(axes)) + tuple(axes)))
        all_of_them.append((shape, layout.spec))
        if not _even(mesh.shape, shape, layout.spec):
            uneven.append(f"{jax.tree_util.keystr(path)} {list(shape)} as {layout.spec}")
        return variable.replace(layout)

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    result = jax.tree_util.tree_map_with_path(one, state, is_leaf=is_variable)
    if uneven:
        fits = lambda sizes: all(_even(sizes, *one) for one in all_of_them)  # noqa: E731
        near = _nearest([mesh.shape[axis] for axis in MESH_AXES], mesh.size, fits)
        raise ValueError(
            f"a mesh of {dict(mesh.shape)} does not divide {len(uneven)} parameters evenly:"
            f" {'; '.join(uneven)}. The nearest that does is {near}"
        )
    return result


def _even(sizes: Mapping[str, int], shape: Sequence[int], where: PartitionSpec) -> bool:
    """Whether a mesh of some sizes shares an array out evenly."""
    ways = (math.prod(sizes[axis] for axis in _tuple(axes)) for axes in where)
    return not any(size % way for size, way in zip(shape, ways, strict=False))


def _tuple(axes: Any) -> tuple[str, ...]:
    """Return the mesh axes of an array's axis: PartitionSpec has None or a name, too."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _nearest(wanted: Sequence[int], devices: int, fits: Callable[[Mapping[str, int]], bool]) -> str:
    """Return sizes of a mesh of so many devices that fits, the nearest to the wanted one."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    found = [
        dict(zip(MESH_AXES, sizes, strict=True))
        for sizes in itertools.product(divisors, repeat=len(MESH_AXES))
        if math.prod(sizes) == devices
    ]

    def far(sizes: Mapping[str, int]) -> tuple[float, tuple[int, ...]]:
        ratios = (size / want for size, want in zip(sizes.values(), wanted, strict=True))
        least = sizes["sequence"], sizes["tensor"], sizes["data"]  # of those as near, plain ones
        return sum(abs(math.log(ratio)) for ratio in ratios), least

    near = min(filter(fits, found), key=far, default=None)
    if near is None:
        return "none: take another number of devices"
    return ", ".join(f"mesh.{axis}={size}" for axis, size in near.items())


def drawing_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Return where the copy lies that completions are drawn with."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes, shape = variable.get_metadata("logical_axes"), variable.get_value().shape
        names = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
        return variable.replace(NamedSharding(mesh, drawing_spec(names, shape, mesh)))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def drawing_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Translate logical axis names of an array that is drawn with.

    Where a size cannot be shared out to all of its mesh axes, to the first of them that can.
    """
    sizes = zip(axes, shape, strict=True)
    return PartitionSpec(*(_dividing(RULES[name].drawing, size, mesh) for name, size in sizes))


def _dividing(axes: tuple[str, ...], size: int, mesh: Mesh) -> tuple[str, ...] | None:
    """Return the longest beginning of some mesh axes that divides a size."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None
