"""Decoders of Qwen's and Llama's kind in Flax NNX, working on one level of the tree at a time.

`extend` computes a level below given ancestors and returns its keys and values, so that the next
level can be put below it: prefill, scoring and training are the same three calls (guide, questions,
completions), and gradients flow through the caches. `decode` does one token of every row with the
row's own cache updated in place.

Architecture: RMSNorm (arXiv 1910.07467), rotary position embedding (arXiv 2104.09864),
grouped-query attention, SwiGLU (arXiv 2002.05202); `ModelConfig.family` says where Qwen2, Qwen3 and
Llama differ.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.attention import Part, attend
from r1re_jax.model.config import ModelConfig

# Models of up to so many layers are compiled layer by layer: a little faster to run, and the longer
# to compile the more there are (docs/decisions.md).
UNROLLED = 8


class Remat(enum.StrEnum):
    """What the backward pass computes again instead of keeping."""

    NONE = "none"  # keep everything: fastest where memory allows
    LAYER = "layer"  # keep only each layer's input

    def wrap(self, layer: Callable) -> Callable:
        """Return the layer function with this policy applied."""
        return jax.checkpoint(layer) if self is Remat.LAYER else layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Rotated keys and values of one level for all layers, each [L, *B, T, K, A]."""

    key: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A finished level that levels below attend to.

    Attributes:
        key: [L, *B, T, K, A].
        value: [L, *B, T, K, A].
        length: [*B] int32; keys from `length` on are padding.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array


class Linear(nnx.Module):
    """y = x·W (+ b), with logical axis names for sharding; an adapter adds to x·W."""

    adapter: Callable[[jax.Array], jax.Array] | None = None  # of r1re_jax.model.lora

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
        y = jnp.einsum("...i,io->...o", x, self.weight[...].astype(x.dtype))
        if self.adapter is not None:
            y += self.adapter(x)
        return y if self.bias is None else y + _last_axis(self.bias[...].astype(x.dtype), y.ndim)


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
        return (x32 * scale).astype(x.dtype) * _last_axis(self.weight[...].astype(x.dtype), x.ndim)


def rotary(x: jax.Array, position: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Rotate the halves of each head by position-dependent angles (arXiv 2104.09864, equation 34).

    Args:
        x: [*B, T, heads, A].
        position: [*B, T] int32.
        frequency: [A/2], radians a token.
    """
    rates = _last_axis(jnp.asarray(frequency, jnp.float32), x.ndim)
    angle = position[..., None, None].astype(jnp.float32) * rates
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)


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

    def project(self, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[*B, T, D] -> rotated query [*B, T, H, A], rotated key and value [*B, T, K, A]."""
        h = self.attention_norm(x)
        heads = lambda y: y.reshape(*y.shape[:-1], -1, self.config.head_size)  # noqa: E731
        query, key = heads(self.query(h)), heads(self.key(h))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        turn = lambda x: rotary(x, position, self.config.rope_frequencies)  # noqa: E731
        return turn(query), turn(key), heads(self.value(h))

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Add the attention's output [*B, T, H, A] and the MLP to the stream x [*B, T, D]."""
        x = x + self.output(attended.reshape(*attended.shape[:-2], -1))
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Qwen(nnx.Module):
    """The policy network. Parameters are fp32 masters; `dtype` is what the forward computes in."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str | jnp.dtype = jnp.float32,
        remat: Remat = Remat.NONE,
    ):
        """Draw random weights; `r1re_jax.model.hf` loads real ones into the same structure."""
        # jnp.dtype makes "bfloat16" and jnp.bfloat16 one static value, hence one compilation.
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), Remat(remat)
        normal = nnx.initializers.normal
        shape = (config.vocab, config.width)
        # A tied embedding is also the head: its rows must give logits of deviation ~1.
        scale = config.width**-0.5 if config.tied else 1.0
        self.embed = sharding.param(
            normal(scale)(rngs.params(), shape, jnp.float32), ("vocab", "embed")
        )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        # Assigned once: NNX fixes by the first value whether an attribute holds parameters.
        self.head = None if config.tied else self._random_head(rngs)

    def extend(
        self, tokens: jax.Array, *, start: jax.Array, ancestors: Sequence[Cache] = ()
    ) -> tuple[jax.Array, KeyValue]:
        """Compute one level of the tree below its ancestors.

        Args:
            tokens: [*B, T] int32, right-padded.
            start: [*B] int32, position of each row's first token: the ancestors' true lengths
                added.
            ancestors: caches with batch dimensions B' that are prefixes of B.

        Returns:
            hidden [*B, T, D] before the head (final norm applied), and the level's KeyValue.
        """
        length = tokens.shape[-1]
        position = start[..., None] + _last_axis(jnp.arange(length, dtype=jnp.int32), tokens.ndim)
        causal = jnp.tril(jnp.ones((length, length), bool))
        graph, layers = nnx.split(self.layers)

        def layer(x: jax.Array, inputs: tuple) -> tuple[jax.Array, KeyValue]:
            weights, above = inputs
            block = nnx.merge(graph, weights)
            query, key, value = block.project(x, position)
            parts = [*_ancestor_parts(above, ancestors), Part(key, value, causal)]
            return block.finish(x, attend(query, parts)), KeyValue(key, value)

        above = tuple(KeyValue(cache.key, cache.value) for cache in ancestors)
        x, own = jax.lax.scan(
            self.remat.wrap(layer),
            self._embedded(tokens),
            (layers, above),
            unroll=self.config.layers <= UNROLLED,
        )
        return self.norm(x), own

    def decode(
        self,
        tokens: jax.Array,
        *,
        step: jax.Array,
        start: jax.Array,
        ancestors: Sequence[Cache],
        own: KeyValue,
    ) -> tuple[jax.Array, KeyValue]:
        """Compute one token of every row, writing its key and value into the row's own cache.

        Args:
            tokens: [*B] int32, token number `step` of each row.
            step: int32 scalar, slot of the own cache to write; slots up to it are attended to.
            start: [*B] int32, position of each row's token 0.
            ancestors: as in `extend`; never copied per row.
            own: [L, *B, C, K, A], carried through the layers and updated in place (as input and
                output of a scan it would be copied at every token).

        Returns:
            hidden [*B, D] and the updated own cache.
        """
        position = (start + step)[..., None]
        seen = (jnp.arange(own.key.shape[-3]) <= step)[None]
        graph, layers = nnx.split(self.layers)

        def layer(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            x, own = carry
            index, weights, above = inputs
            block = nnx.merge(graph, weights)
            query, key, value = block.project(x, position)
            own = KeyValue(_write(own.key, key, index, step), _write(own.value, value, index, step))
            mine = Part(own.key[index], own.value[index], seen)
            parts = [*_ancestor_parts(above, ancestors), mine]
            return (block.finish(x, attend(query, parts)), own), None

        above = tuple(KeyValue(cache.key, cache.value) for cache in ancestors)
        index = jnp.arange(self.config.layers)
        (x, own), _ = jax.lax.scan(
            layer, (self._embedded(tokens[..., None]), own), (index, layers, above)
        )
        return self.norm(x)[..., 0, :], own

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] in fp32 whatever the forward computes in."""
        return jnp.einsum(
            "...d,dv->...v",
            hidden,
            self.head_weight(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def head_weight(self, dtype: jnp.dtype) -> jax.Array:
        """Return the output projection [D, V]: the head, or the embedding transposed where tied."""
        weight = self.embed[...].T if self.head is None else self.head[...]
        return weight.astype(dtype)

    def empty_cache(self, batch: Sequence[int], length: int) -> KeyValue:
        """Return a zero own cache [L, *batch, length, K, A]."""
        config = self.config
        shape = (config.layers, *batch, length, config.kv_heads, config.head_size)
        return KeyValue(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def _random_head(self, rngs: nnx.Rngs) -> nnx.Param:
        shape = (self.config.width, self.config.vocab)
        draw = nnx.initializers.normal(self.config.width**-0.5)
        return sharding.param(draw(rngs.params(), shape, jnp.float32), ("embed", "vocab"))

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        return self.embed[...].astype(self.dtype)[tokens]


def abstract_qwen(
    config: ModelConfig, *, dtype: str | jnp.dtype = jnp.float32, remat: Remat = Remat.NONE
) -> Qwen:
    """Return the model with shapes in place of arrays, to be filled: no memory, no random draws."""
    return nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))


def _ancestor_parts(above: Sequence[KeyValue], ancestors: Sequence[Cache]) -> list[Part]:
    """One layer's keys of each ancestor, with the mask that hides the ancestor's padding."""
    parts = []
    for keys, cache in zip(above, ancestors, strict=True):
        slots = jnp.arange(keys.key.shape[-3], dtype=jnp.int32)
        seen = _last_axis(slots, cache.length.ndim + 1) < cache.length[..., None]
        parts.append(Part(keys.key, keys.value, seen[..., None, :]))
    return parts


def _last_axis(vector: jax.Array, rank: int) -> jax.Array:
    """Write out the axes along which a vector is broadcast: [A] -> [1, …, 1, A]."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)


def _write(cache: jax.Array, new: jax.Array, layer: jax.Array, step: jax.Array) -> jax.Array:
    """Put new [*B, 1, K, A] into cache [L, *B, C, K, A] at (layer, …, step)."""
    batch = new.ndim - 3
    start = (layer, *[0] * batch, step, 0, 0)
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), start)
