"""Masks and masked sums: what lies under mask 0 never reaches a value or a gradient.

Multiplying by the mask is not enough: 0 · NaN is NaN, in the value and, by the chain rule, in the
gradient. So inputs are replaced *before* anything is computed from them (`keep`), which makes every
later operation finite there and its cotangent a true zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def as_mask(mask: ArrayLike) -> jax.Array:
    """Return a bool, integer or floating mask as bool."""
    return jnp.asarray(mask) != 0


def length_mask(length: ArrayLike, limit: int) -> jax.Array:
    """Mask the true tokens of right-padded rows, by position and never by token id.

    Args:
        length: [*B] int, true tokens of each row; the stop token counts.
        limit: T, width of the rows.

    Returns:
        [*B, T] bool.
    """
    length = jnp.asarray(length)[..., None]
    position = jax.lax.broadcasted_iota(jnp.int32, (*length.shape[:-1], limit), length.ndim - 1)
    return position < length


def keep(values: ArrayLike, mask: jax.Array) -> jax.Array:
    """Return `values` in fp32 with 0 wherever the bool `mask` of the same rank is False."""
    return jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)


def count(mask: jax.Array, axis: int | None = None, *, keepdims: bool = False) -> jax.Array:
    """Count True as fp32, at least 1, so that an empty sum divided by it is 0.

    The sum is taken over integers: fp32 stops counting at 2^24.
    """
    total = jnp.sum(mask, axis, dtype=jnp.int32, keepdims=keepdims)
    return jnp.maximum(total, 1).astype(jnp.float32)


def require_shape(name: str, array: ArrayLike, expected: tuple[int, ...], like: str) -> None:
    """Refuse an array of another shape: silent broadcasting would average the wrong things.

    Raises:
        ValueError: naming both shapes.
    """
    if np.shape(array) != expected:
        raise ValueError(f"{name} has shape {np.shape(array)}; expected {expected}, from {like}")
