"""What an update changes: step, parameters and optimizer state, sharded on the mesh from the start.

In the train room parameters are a flat dict, dotted path in the Qwen module -> array: the names of
checkpoints, optimizer states and masks. `model_state` turns it into what `nnx.merge` takes.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1re_jax import sharding
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.lora import UP, is_adapter
from r1re_jax.model.qwen import Qwen, Remat, placed

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a resumed run must find again, beside its configuration.

    Attributes:
        step: int32 scalar, steps completed in the whole run.
        params: dotted name -> fp32 array.
        opt_state: of the phase's optimizer.
        reference: parameters of a reference that follows the policy; else None.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    reference: Params | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The model without its arrays: what programs are built for.

    Attributes:
        graph: of `nnx.split(model)`.
        mesh: where everything lives.
        shapes: dotted name -> shape and dtype, its sharding with them; of what is trained.
        axes: dotted name -> logical axes; stacked parameters have the layers in front of them.
        frozen: as `shapes`, of what an adapter leaves as it is; empty where all is trained.
        moments_on_host: whether the optimizer's moments lie in the host's memory between updates.
    """

    graph: nnx.GraphDef
    mesh: Mesh
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str, ...]]
    frozen: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    moments_on_host: bool = False

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        """Dotted name -> sharding, of what is trained."""
        return {name: shape.sharding for name, shape in self.shapes.items()}

    @property
    def matrices(self) -> dict[str, bool]:
        """Dotted name -> whether it is a matrix, by logical axes: a stacked bias has two too."""
        return {name: len(self.axes[name]) > 1 for name in self.shapes}

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds."""
        return NamedSharding(self.mesh, PartitionSpec())


def model_layout(model: Qwen, mesh: Mesh, *, moments_on_host: bool = False) -> Layout:
    """Describe a model (its arrays may be abstract) on a mesh.

    Where it has adapters they alone are trained. The rest is held in the type that the forward
    computes in: it would be cast to that wherever it is used.
    """
    graph, state = nnx.split(placed(model, mesh))
    shardings, flat = _flat(sharding.parameter_shardings(state, mesh)), _flat(state)
    adapted = any(map(is_adapter, flat))
    shapes, axes, frozen = {}, {}, {}
    for name, variable in flat.items():
        value, where = variable.get_value(), shardings[name].get_value()
        if adapted and not is_adapter(name):
            dtype = value.dtype if value.dtype == jnp.int8 else model.dtype
            frozen[name] = jax.ShapeDtypeStruct(value.shape, dtype, sharding=where)
        else:
            shapes[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
        axes[name] = tuple(variable.get_metadata("logical_axes"))
    return Layout(
        graph=graph,
        mesh=mesh,
        shapes=shapes,
        axes=axes,
        frozen=frozen,
        moments_on_host=moments_on_host,
    )


def drawing_layout(model: Qwen, mesh: Mesh) -> Layout:
    """Describe the copy of a model (its arrays may be abstract) that completions are drawn with.

    It is held in the type that the forward computes in, and lies where drawing wants it.
    """
    graph, state = nnx.split(placed(model, mesh))
    shardings, flat = _flat(sharding.drawing_shardings(state, mesh)), _flat(state)
    shapes, axes = {}, {}
    for name, variable in flat.items():
        value = variable.get_value()
        dtype = value.dtype if value.dtype == jnp.int8 else model.dtype
        where = shardings[name].get_value()
        shapes[name] = jax.ShapeDtypeStruct(value.shape, dtype, sharding=where)
        axes[name] = tuple(variable.get_metadata("logical_axes"))
    return Layout(graph=graph, mesh=mesh, shapes=shapes, axes=axes)


def random_params(config: ModelConfig, layout: Layout, *, seed: int) -> Params:
    """Draw random parameters, each shard where it belongs; equal on every mesh."""

    def draw() -> Params:
        return flat_params(nnx.state(Qwen(config, rngs=nnx.Rngs(seed), remat=Remat.NONE)))

    return jax.jit(draw, out_shardings=layout.shardings)()


def fresh_adapter(layout: Layout, *, seed: int) -> Params:
    """Draw adapters: A normal of variance 1 / (3 · in), B zero; equal on every mesh.

    So A·B is 0 and the policy its base (arXiv 2106.09685, section 4.1). The variance is that of
    the uniform draw of the paper's code and of PEFT, so that learning rates known there hold here.
    """

    def draw(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if name.endswith(UP):
            return jnp.zeros(shape.shape, shape.dtype)
        # By its name, so that what else is adapted changes no draw.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return jax.random.normal(key, shape.shape, shape.dtype) * (3 * shape.shape[-2]) ** -0.5

    def draw_all() -> Params:
        return {name: draw(name, shape) for name, shape in layout.shapes.items()}

    return jax.jit(draw_all, out_shardings=layout.shardings)()


def no_adapter(layout: Layout) -> Params:
    """Return adapters that are all zero: with them the policy is its base."""
    zeros = lambda: {n: jnp.zeros(x.shape, x.dtype) for n, x in layout.shapes.items()}  # noqa: E731
    return jax.jit(zeros, out_shardings=layout.shardings)()


def place_params(params: Mapping[str, Any], layout: Layout) -> Params:
    """Copy parameters to their shards, so that donating the result leaves the argument whole."""
    return {
        name: jax.device_put(params[name], layout.shardings[name], may_alias=False)
        for name in layout.shapes
    }


def create_state(
    params: Params, optimizer: optax.GradientTransformation, layout: Layout, *, step: int = 0
) -> TrainState:
    """Begin a phase: a fresh optimizer state for the given parameters, sharded as they are."""
    make = jax.jit(optimizer.init, out_shardings=_optimizer_shardings(optimizer, layout))
    count = jax.device_put(jnp.int32(step), layout.replicated)
    return TrainState(step=count, params=params, opt_state=make(params))


def abstract_state(optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Return the shapes, dtypes and shardings of a state; what a checkpoint is restored to."""
    opt_state = jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        jax.eval_shape(optimizer.init, layout.shapes),
        _optimizer_shardings(optimizer, layout),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    return TrainState(step=step, params=dict(layout.shapes), opt_state=opt_state)


def model_state(params: Mapping[str, Any]) -> nnx.State:
    """Return the parameters as a state for `nnx.merge`; works on tracers too."""
    return nnx.from_flat_state([(tuple(name.split(".")), params[name]) for name in params])


def flat_params(state: nnx.State) -> Params:
    """Return a model's state as dotted name -> array; the inverse of `model_state`."""
    return {name: variable.get_value() for name, variable in _flat(state).items()}


def parameter_bytes(layout: Layout) -> tuple[int, int]:
    """Return the bytes of all parameters, frozen ones too, and of those on each device."""
    total = local = 0
    for shape in (*layout.shapes.values(), *layout.frozen.values()):
        total += shape.size * shape.dtype.itemsize
        local += math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
    return total, local


def parameter_table(layout: Layout) -> str:
    """Return a line per parameter: name, shape, logical and mesh axes, bytes in all, per device."""
    rows = [("parameter", "shape", "axes", "mesh axes", "bytes", "per device")]
    for name, shape in (layout.frozen | layout.shapes).items():
        size = shape.size * shape.dtype.itemsize
        mine = math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
        spec = " ".join(
            "+".join(axes) if isinstance(axes, tuple) else axes or "-"
            for axes in shape.sharding.spec
        )
        shown = "×".join(map(str, shape.shape))
        rows.append((name, shown, " ".join(layout.axes[name]), spec, f"{size:,}", f"{mine:,}"))
    sums = {"trained": dataclasses.replace(layout, frozen={})} if layout.frozen else {}
    for what, of in {**sums, "total": layout}.items():
        total, local = parameter_bytes(of)
        rows.append((what, "", "", "", f"{total:,}", f"{local:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place > 3 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _flat(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _optimizer_shardings(optimizer: optax.GradientTransformation, layout: Layout) -> Any:
    """Moments lie as their parameters do, found by name; counters are everywhere."""

    def where(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        of = layout.shapes.get(name)
        if of is None or of.shape != leaf.shape:
            return layout.replicated
        return sharding.on_host(of.sharding) if layout.moments_on_host else of.sharding

    return jax.tree_util.tree_map_with_path(where, jax.eval_shape(optimizer.init, layout.shapes))
