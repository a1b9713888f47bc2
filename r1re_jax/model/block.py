"""One decoder layer and its parts, as Qwen2, Qwen3 and Llama have them.

RMSNorm (arXiv 1910.07467), rotary position embedding (arXiv 2104.09864), grouped-query attention,
SwiGLU (arXiv 2002.05202); `ModelConfig.family` says where they differ.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.linear import Linear, last_axis


class RMSNorm(nnx.Module):
    """x / rms(x) · weight, statistics in fp32 (arXiv 1910.07467, equation 4)."""

    def __init__(self, width: int, *, eps: float):
        """Weight starts at one."""
        self.weight = sharding.param(jnp.ones(width), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype) * last_axis(self.weight[...].astype(x.dtype), x.ndim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Sine and cosine of every position's angles, fp32.

    Attributes:
        sin: [*B, T, 1, 2, A/2], the first of the two negative: what the other half is multiplied
            with.
        cos: [*B, T, 1, A/2].
    """

    sin: jax.Array
    cos: jax.Array


def rotation(position: jax.Array, frequency: np.ndarray) -> Rotation:
    """Return the rotation of each position [*B, T] for frequencies [A/2] in radians a token."""
    rates = last_axis(jnp.asarray(frequency, jnp.float32), position.ndim + 2)
    angle = position[..., None, None].astype(jnp.float32) * rates
    return Rotation(jnp.stack([-jnp.sin(angle), jnp.sin(angle)], -2), jnp.cos(angle))


def rotary(x: jax.Array, turn: Rotation) -> jax.Array:
    """Rotate the halves of each head [*B, T, heads, A] (arXiv 2104.09864, equation 34)."""
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    # (low, high) · cos + (high, low) · (−sin, sin): XLA's CPU compiler is slow at concatenating.
    turned = halves * turn.cos[..., None, :] + halves[..., ::-1, :] * turn.sin
    return turned.reshape(x.shape).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer: pre-norm attention and SwiGLU MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Output projections are scaled down by √(2L), as in GPT-2, so that depth does not grow."""
        self.config = config
        width, size = config.width, config.head_size
        query, kv = config.query_heads * size, config.kv_heads * size
        scale, out_scale = width**-0.5, (2 * config.layers) ** -0.5
        linear = lambda axes, shape, s=scale, bias=False: Linear(  # noqa: E731
            axes, shape, bias=bias, scale=s, rngs=rngs
        )
        self.attention_norm = RMSNorm(width, eps=config.norm_eps)
        bias = config.qkv_bias
        self.query = linear(("embed", "heads"), (width, query), bias=bias)
        self.key = linear(("embed", "kv_heads"), (width, kv), bias=bias)
        self.value = linear(("embed", "kv_heads"), (width, kv), bias=bias)
        self.query_norm = RMSNorm(size, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(size, eps=config.norm_eps) if config.qk_norm else None
        self.output = linear(("heads", "embed"), (query, width), query**-0.5 * out_scale)
        self.mlp_norm = RMSNorm(width, eps=config.norm_eps)
        self.gate = linear(("embed", "mlp"), (width, config.mlp_width))
        self.up = linear(("embed", "mlp"), (width, config.mlp_width))
        self.down = linear(
            ("mlp", "embed"), (config.mlp_width, width), config.mlp_width**-0.5 * out_scale
        )

    def project(self, x: jax.Array, turn: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[*B, T, D] -> query [*B, T, H, A], key [K, *B, A, T], value [K, *B, T, A]."""
        h = self.attention_norm(x)
        heads = lambda y: y.reshape(*y.shape[:-1], -1, self.config.head_size)  # noqa: E731
        query, key = heads(self.query(h)), heads(self.key(h))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        first = lambda x: jnp.moveaxis(x, -2, 0)  # noqa: E731
        key, value = first(rotary(key, turn)), first(heads(self.value(h)))
        return rotary(query, turn), jnp.swapaxes(key, -1, -2), value

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Add the attention's output [*B, T, H, A] and the MLP to the stream x [*B, T, D]."""
        x = x + self.output(attended.reshape(*attended.shape[:-2], -1))
        h = self.mlp_norm(x)
        inner = _swiglu(self.gate(h), self.up(h))
        # Else the TPU compiler computes the up projection inside the down projection, more slowly.
        return x + self.down(jax.lax.optimization_barrier(inner))


@jax.checkpoint
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Gated activation (arXiv 2002.05202, equation 6); its inner arrays are not kept."""
    return jax.nn.silu(gate) * up
