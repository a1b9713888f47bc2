"""A model that draws from int8: its matrices, the cache of what it has written, or both.

A quantised matrix computes (x·Q) · scale, a scale for each output, in the type of the forward
(weight-only quantisation). Embedding, head, norms, biases and adapters stay as they are: they are
few bytes, or looked up, or what a run trains. Nothing here is trained or saved: `int8_weights`
makes the numbers anew from those of the policy.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.int8 import Int8, Quantisation
from r1re_jax.model.lora import WEIGHT, linears
from r1re_jax.model.qwen import Qwen

# Name of the scales, behind that of the linear layer.
SCALE = ".scale"


def quantise(model: Qwen, *, weights: Quantisation, cache: Quantisation) -> Qwen:
    """Return a model of shapes that stores so; the argument stays as it is.

    A scale has the logical axis of its matrix's outputs, and is sharded as they are.

    Args:
        model: arrays or shapes; adapters stay.
        weights: of the layers' matrices.
        cache: of the keys and values that `Qwen.decode` writes.
    """
    model = nnx.merge(*nnx.split(model))
    model.cache = cache
    for linear in linears(model).values() if weights is Quantisation.INT8 else ():
        *stack, inputs, outputs = linear.weight.shape
        axes = linear.weight.get_metadata("logical_axes")
        shape = jax.ShapeDtypeStruct
        linear.weight = sharding.param(shape((*stack, inputs, outputs), jnp.int8), axes)
        linear.scale = sharding.param(shape((*stack, outputs), model.dtype), axes[1:])
    return model


def matrix_names(model: Qwen) -> tuple[str, ...]:
    """Return the dotted names of the matrices that `quantise` makes int8."""
    return tuple(f"layers.{name}{WEIGHT}" for name in linears(model))


def int8_weights(matrices: Mapping[str, jax.Array], *, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Return the matrices quantised and their scales, by dotted name.

    Args:
        matrices: dotted name -> [..., in, out], of `matrix_names`.
        dtype: of the forward, in which scales are.
    """
    found = {}
    for name, weight in matrices.items():
        whole = Int8.of(weight, axis=-2, dtype=dtype)
        found[name] = whole.value
        found[name.removesuffix(WEIGHT) + SCALE] = whole.scale[..., 0, :]
    return found
