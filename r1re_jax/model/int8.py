"""Numbers as int8 times a scale: matrices, and the keys and values of a cache.

Symmetric, by the largest absolute value along one axis (absmax): scale = max|x| / 127 and
q = round(x / scale), so that x differs from scale · q by half a scale at most (the weights of
LLM.int8(), arXiv 2208.07339, section 2.1, without its outliers).
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp

LARGEST = 127


class Quantisation(enum.StrEnum):
    """What numbers are stored as."""

    NONE = "none"  # as they are
    INT8 = "int8"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Numbers that share a scale along one axis.

    The scale keeps that axis, of size 1: what moves, pads or cuts the other axes of an array does
    so with the two arrays of this tree.

    Attributes:
        value: int8, of the numbers' shape.
        scale: of the type that the numbers are read in.
    """

    value: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x: jax.Array, *, axis: int, dtype: jnp.dtype) -> "Int8":
        """Quantise, to be read in `dtype`.

        The scale is rounded to that type first and the numbers are divided by what it then is, so
        that its rounding is no error of theirs.
        """
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis, keepdims=True) / LARGEST
        # Numbers that are all zero have a scale too, and none that flushing would make zero.
        scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny).astype(dtype)
        value = jnp.round(x / scale.astype(jnp.float32))
        return cls(jnp.clip(value, -LARGEST, LARGEST).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Of the numbers."""
        return self.value.ndim

    @property
    def size(self) -> int:
        """How many numbers."""
        return self.value.size

    @property
    def dtype(self) -> jnp.dtype:
        """What the numbers are read in."""
        return self.scale.dtype


def stored_as(like: jax.Array | Int8, x: jax.Array, *, axis: int) -> jax.Array | Int8:
    """Return x stored as another array is; numbers along the axis share a scale in int8."""
    if isinstance(like, Int8):
        return Int8.of(x, axis=axis, dtype=like.scale.dtype)
    return x.astype(like.dtype)
