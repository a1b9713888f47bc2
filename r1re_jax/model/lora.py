"""Low-rank adaptation (LoRA, arXiv 2106.09685): W stays as it is, A and B beside it are trained.

An adapted matrix computes x·W + (alpha / rank) · (x·A)·B. A and B have the matrix's layers in front
and its logical axes on their outer sides, so that they are stacked and sharded as it is.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.linear import Linear
from r1re_jax.model.qwen import Qwen

# Names of the parameters of an adapter, behind that of what it adapts.
DOWN, UP = ".adapter.a", ".adapter.b"
WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which matrices are adapted, and how.

    Attributes:
        rank: r of A [in, r] and B [r, out]; 0 adapts nothing, and all parameters are trained.
        alpha: A·B counts alpha / rank times, so that a learning rate that suits one rank suits
            others (arXiv 2106.09685, section 4.1).
        targets: regular expression; a matrix is adapted where it matches the whole of its name.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = r"layers\.(query|key|value|output|gate|up|down)\.weight"

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be at least 0")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets is {self.targets!r}, no regular expression: {error}"
            ) from None

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        return self.alpha / self.rank

    def choose(self, model: Qwen) -> list[str]:
        """Return the dotted names of the matrices to adapt, in the model's order.

        Raises:
            ValueError: the targets match nothing, or what is no matrix of a linear layer; the
                message lists what there is.
        """
        names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
        found = [name for name in names if re.fullmatch(self.targets, name)]
        known = [f"layers.{name}{WEIGHT}" for name in linears(model)]
        if other := [name for name in found if name not in known]:
            raise ValueError(
                f"lora.targets {self.targets!r} matches {', '.join(other)}, which LoRA does not"
                f" adapt: only matrices that multiply, {', '.join(known)}"
            )
        if not found:
            raise ValueError(
                f"lora.targets {self.targets!r} matches no matrix; there are {', '.join(known)}"
            )
        return found


class Adapter(nnx.Module):
    """(alpha / rank) · (x·A)·B for one stack of matrices."""

    def __init__(self, weight: nnx.Param, lora: Lora):
        """Make shapes for A [..., in, r] and B [..., r, out]; `state.fresh_adapter` draws them.

        Args:
            weight: [..., in, out], of which shape and logical axes are taken.
            lora: rank and scale.
        """
        *stack, inputs, outputs = weight.shape
        before, behind = weight.get_metadata("logical_axes")
        shape = lambda *last: jax.ShapeDtypeStruct((*stack, *last), jnp.float32)  # noqa: E731
        self.a = sharding.param(shape(inputs, lora.rank), (before, "rank"))
        self.b = sharding.param(shape(lora.rank, outputs), ("rank", behind))
        self.scale = lora.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        low = self.scale * jnp.einsum("...i,ir->...r", x, self.a[...].astype(x.dtype))
        return jnp.einsum("...r,ro->...o", low, self.b[...].astype(x.dtype))


def linears(model: Qwen) -> dict[str, Linear]:
    """Return the linear layers of a block by name."""
    return {name: part for name, part in vars(model.layers).items() if isinstance(part, Linear)}


def adapt(model: Qwen, lora: Lora) -> Qwen:
    """Return a model of shapes with adapters beside its targets; the argument stays as it is.

    Raises:
        ValueError: targets that cannot be adapted; see `Lora.choose`.
    """
    targets = lora.choose(model)
    adapted = nnx.merge(*nnx.split(model))
    for name, linear in linears(adapted).items():
        if f"layers.{name}{WEIGHT}" in targets:
            linear.adapter = Adapter(linear.weight, lora)
    return adapted


def is_adapter(name: str) -> bool:
    """Whether a dotted name is of an adapter's parameter."""
    return name.endswith((DOWN, UP))


def merge(
    params: Mapping[str, jax.Array], adapter: Mapping[str, jax.Array], *, scale: float
) -> dict[str, jax.Array]:
    """Return W + scale · A·B in place of every adapted W (arXiv 2106.09685, equation 3).

    Args:
        params: dotted name -> array, of the base; buffers of adapted matrices are donated, so that
            no more than one is there twice.
        adapter: dotted name -> A or B.
        scale: alpha / rank.

    Returns:
        All parameters, of the types and shardings that those of the base have.
    """
    found = dict(params)
    for down in (name for name in adapter if name.endswith(DOWN)):
        of = down.removesuffix(DOWN)
        where = found[of + WEIGHT].sharding
        added = _merged(found[of + WEIGHT], adapter[down], adapter[of + UP], scale)
        found[of + WEIGHT] = jax.device_put(added, where)
    return found


@jax.jit(donate_argnums=0)
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """[..., in, out], [..., in, r], [..., r, out]; the products in full float32 on any device."""
    low = jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + scale * low).astype(weight.dtype)
