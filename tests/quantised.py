"""Quantised copies of models, and what they should compute: NumPy's own quantisation, undone."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1re_jax.model.int8 import Quantisation
from r1re_jax.model.quantise import int8_weights, matrix_names, quantise
from r1re_jax.model.qwen import Qwen
from r1re_jax.train.state import flat_params, model_state

MATRICES = tuple(
    f"layers.{name}.weight" for name in ("query", "key", "value", "output", "gate", "up", "down")
)


def quantised(model: Qwen, *, weights: str = "none", cache: str = "none") -> Qwen:
    """The model with int8 matrices, an int8 cache, or both."""
    of = quantise(model, weights=Quantisation(weights), cache=Quantisation(cache))
    params = flat_params(nnx.state(model))
    if weights != "none":
        matrices = {name: params[name] for name in matrix_names(model)}
        params |= int8_weights(matrices, dtype=model.dtype)
    graph, _ = nnx.split(of)
    return nnx.merge(graph, model_state(params))


def by_hand(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantised numbers and their scales, along an axis."""
    scale = (np.abs(x).max(axis, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.rint(x / scale), scale


def dequantised(model: Qwen) -> Qwen:
    """The float model whose matrices are those that the int8 ones stand for."""
    params = flat_params(nnx.state(model))
    for name in MATRICES:
        number, scale = by_hand(np.asarray(params[name]), -2)
        params[name] = jnp.asarray((number.astype(np.float64) * scale).astype(np.float32))
    graph, _ = nnx.split(model)
    return nnx.merge(graph, model_state(params))
