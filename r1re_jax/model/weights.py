"""From tensors in files to parameters on devices, a piece at a time.

A parameter of ours is often a stack of many tensors there, and too large to be held twice. So every
device's part is read by itself, and where it is large, layer by layer into place.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from r1re_jax import sharding
from r1re_jax.model.names import BY_OURS, Form, Name
from r1re_jax.model.qwen import Qwen

Index = tuple[slice, ...]
# A part up to this size is put together on the host whatever its tensors' sizes.
SMALL = 2**20


class WeightsError(ValueError):
    """Files of weights that cannot be read or written as asked."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: name of the file.
        shape: of the tensor.
        read: index -> that part of it, as numbers of a type that NumPy casts to floats.
        problem: why it cannot be read, to be said behind its name; empty where it can.
    """

    file: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    problem: str = ""


def fill(
    model: Qwen,
    tensors: Mapping[str, Stored],
    *,
    form: Form,
    source: str,
    dtype: str | jnp.dtype = "float32",
    mesh: Mesh | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Qwen:
    """Fill an abstract model; every tensor must have its place, and every parameter its tensors.

    On the host there is, beside what the devices hold, at most twice the largest tensor.

    Args:
        model: of `abstract_qwen`.
        tensors: by their names there.
        form: whose names these are.
        source: the folder or file, for messages.
        dtype: of the parameters.
        mesh: where parameters go, by the sharding table; None: the first device.
        ignored: whether a tensor that has no place is left aside.

    Raises:
        WeightsError: tensors that are missing, unexpected, mis-shaped or of a type that is not
            read, all named in one message; or one with a number that is not finite.
    """
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [BY_OURS[".".join(map(str, path))] for path, _ in flat]
    shapes = [variable.shape for _, variable in flat]
    _check(names, shapes, tensors, form=form, source=source, ignored=ignored)
    places: list[Sharding] = [SingleDeviceSharding(jax.devices()[0])] * len(flat)
    if mesh is not None:
        spread = nnx.to_flat_state(sharding.parameter_shardings(state, mesh))
        places = [where.get_value() for _, where in spread]
    kind = jnp.dtype(dtype)
    largest = max(int(np.prod(tensor.shape)) for tensor in tensors.values()) * kind.itemsize
    filled = []
    for (path, variable), name, where in zip(flat, names, places, strict=True):
        reader = _Reader(name, form, variable.shape, kind, tensors)
        filled.append((path, variable.replace(_place(reader, where, largest))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _check(
    names: Sequence[Name],
    shapes: Sequence[tuple[int, ...]],
    tensors: Mapping[str, Stored],
    *,
    form: Form,
    source: str,
    ignored: Callable[[str], bool],
) -> None:
    """Raise one error that names every tensor which does not fit, and its file."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in zip(names, shapes, strict=True):
        expected |= name.tensors(form, shape)
    problems = [
        f"missing {name} {list(expected[name])}" for name in expected if name not in tensors
    ]
    for name, stored in sorted(tensors.items()):
        where = f"{stored.file}: "
        if name not in expected:
            if not ignored(name):
                problems.append(f"{where}unexpected {name} {list(stored.shape)}")
        elif stored.shape != expected[name]:
            problems.append(
                f"{where}{name} is {list(stored.shape)}, expected {list(expected[name])}"
            )
        elif stored.problem:
            problems.append(f"{where}{name} {stored.problem}")
    if problems:
        raise WeightsError(
            f"{source}: {len(problems)} tensors do not fit the configuration:\n  "
            + "\n  ".join(problems)
        )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads parts of one of our parameters.

    Attributes:
        name: its row of the table.
        form: whose names the tensors have.
        shape: of the whole parameter.
        dtype: to read it as.
        tensors: by their names there.
    """

    name: Name
    form: Form
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: Mapping[str, Stored]

    def layer(self, number: int, index: Index) -> np.ndarray:
        """Return the part [index] of one layer (or of all, where they are not stacked).

        Raises:
            WeightsError: a number in it is not finite.
        """
        theirs = self.name.theirs(self.form, number)
        stored = self.tensors[theirs]
        part = stored.read(index[::-1] if self.name.transposed else index).astype(self.dtype)
        if not np.isfinite(part).all():
            raise WeightsError(
                f"{stored.file}: {theirs} holds numbers that are not finite; the file is damaged,"
                f" its training diverged, or {self.dtype} cannot hold them"
            )
        return part.T if self.name.transposed else part

    def layers(self, index: Index) -> range:
        """Return the layers of a part [L, …]."""
        return range(*index[0].indices(self.shape[0]))

    def part(self, index: Index) -> np.ndarray:
        """Return the part [index] of the whole parameter."""
        if not self.name.stacked:
            return self.layer(0, index)
        return np.stack([self.layer(number, index[1:]) for number in self.layers(index)])


def _place(reader: _Reader, where: Sharding, largest: int) -> jax.Array:
    """Read one of our parameters, every device's part by itself: never the whole of it."""
    size = int(np.prod(where.shard_shape(reader.shape))) * reader.dtype.itemsize
    small = size <= max(SMALL, largest) or not reader.name.stacked
    # Neighbours that hold the same part read it once; more than one part is never kept.
    read = functools.lru_cache(1)(lambda *bounds: reader.part(tuple(slice(*b) for b in bounds)))
    parts = []
    # One device after the other: `make_array_from_callback` would hold all parts beside the array.
    for device, index in where.addressable_devices_indices_map(reader.shape).items():
        if small:
            bounds = (one.indices(size)[:2] for one, size in zip(index, reader.shape, strict=True))
            part = jax.device_put(read(*bounds), device)
        else:
            part = _by_layers(reader, index, device)
        parts.append(jax.block_until_ready(part))
    return jax.make_array_from_single_device_arrays(reader.shape, where, parts)


def _by_layers(reader: _Reader, index: Index, device: jax.Device) -> jax.Array:
    """Put a device's part of a stack together on the device, so that the host has one layer."""
    stack = None
    for place, number in enumerate(layers := reader.layers(index)):
        layer = jax.device_put(reader.layer(number, index[1:]), device)
        if stack is None:
            stack = jnp.zeros((len(layers), *layer.shape), layer.dtype, device=device)
        stack = jax.block_until_ready(_put(stack, layer, place))
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, place, axis=0)
