"""Matrix products with weights, and the module that holds them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from r1re_jax import sharding


class Linear(nnx.Module):
    """y = x·W (+ b), with logical axis names for sharding; an adapter adds to x·W."""

    adapter: Callable[[jax.Array], jax.Array] | None = None  # of r1re_jax.model.lora
    scale: nnx.Param | None = None  # [out], of an int8 W: r1re_jax.model.quantise

    def __init__(
        self,
        axes: tuple[str, str],
        shape: tuple[int, int],
        *,
        bias: bool,
        scale: float,
        rngs: nnx.Rngs,
    ):
        """Draw W [in, out] from a normal of deviation `scale`; b is zero."""
        init = nnx.initializers.normal(scale)
        self.weight = sharding.param(init(rngs.params(), shape, jnp.float32), axes)
        self.bias = sharding.param(jnp.zeros(shape[1]), axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        y = product(x, self.weight[...].astype(x.dtype))
        if self.scale is not None:
            y *= last_axis(self.scale[...].astype(x.dtype), y.ndim)
        if self.adapter is not None:
            y += self.adapter(x)
        return y if self.bias is None else y + last_axis(self.bias[...].astype(x.dtype), y.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x·W: [..., in], [in, out] -> [..., out] in `dtype`, else in theirs.

    Its gradient is that of the einsum, in another order: the weight's is a product of two matrices
    whose first is the one that is transposed, so that the narrower one comes first.
    """
    return jnp.einsum("...i,io->...o", x, weight, preferred_element_type=dtype)


def _product_forward(
    x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple]:
    return product(x, weight, dtype), (x, weight)


def _product_backward(
    _: jnp.dtype | None, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    by_x = jnp.einsum("...o,io->...i", cotangent, weight, preferred_element_type=x.dtype)
    rows = tuple(range(x.ndim - 1))
    over_rows = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=((rows, rows), ((), ())),
        preferred_element_type=weight.dtype,
    )
    if weight.shape[0] <= weight.shape[1]:
        return by_x, over_rows(x, cotangent)
    return by_x, over_rows(cotangent, x).T


product.defvjp(_product_forward, _product_backward)


def last_axis(vector: jax.Array, rank: int) -> jax.Array:
    """Write out the axes along which a vector is broadcast: [A] -> [1, …, 1, A]."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)
