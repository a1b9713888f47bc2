"""Decoders of Qwen's and Llama's kind in Flax NNX, working on one level of the tree at a time.

`extend_levels` computes levels below given ancestors and returns their keys and values, so that the
next level can be put below them: prefill, scoring and training are this call (guide, questions,
completions), and gradients flow through the caches. `decode` does one token of every row with the
row's own cache updated in place.

Architecture: RMSNorm (arXiv 1910.07467), rotary position embedding (arXiv 2104.09864),
grouped-query attention, SwiGLU (arXiv 2002.05202); `ModelConfig.family` says where Qwen2, Qwen3 and
Llama differ.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1re_jax import sharding
from r1re_jax.model.attention import attend
from r1re_jax.model.block import Block, RMSNorm, rotation
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.int8 import Int8, Quantisation, stored_as
from r1re_jax.model.linear import last_axis, product
from r1re_jax.model.parts import Part
from r1re_jax.model.spread import Attention, Spread
from r1re_jax.model.tree import Level

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
    """Rotated keys and values of one level for all layers.

    Attributes:
        key: [L, K, *B, A, T], or L arrays without the first axis.
        value: [L, K, *B, T, A], or likewise.
    """

    key: jax.Array | tuple[jax.Array | Int8, ...]
    value: jax.Array | tuple[jax.Array | Int8, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A finished level that levels below attend to.

    Attributes:
        key: as of `KeyValue`.
        value: as of `KeyValue`.
        length: [*B] int32; keys from `length` on are padding.
    """

    key: jax.Array | tuple[jax.Array | Int8, ...]
    value: jax.Array | tuple[jax.Array | Int8, ...]
    length: jax.Array


class Qwen(nnx.Module):
    """The policy network. Parameters are fp32 masters; `dtype` is what the forward computes in."""

    cache: Quantisation = Quantisation.NONE  # what `decode` writes; see r1re_jax.model.quantise
    mesh: Mesh | None = None  # that arrays are spread over, see `placed`
    spread: Spread | None = None  # of attention; None where it is left to XLA

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str | jnp.dtype = jnp.float32,
        remat: Remat = Remat.NONE,
        attention: Attention = Attention.AUTO,
    ):
        """Draw random weights; `r1re_jax.model.hf` loads real ones into the same structure."""
        # jnp.dtype makes "bfloat16" and jnp.bfloat16 one static value, hence one compilation.
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), Remat(remat)
        self.attention = Attention(attention)
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
        # Nothing attends to the level here, so its true lengths do not matter.
        whole = jnp.full(tokens.shape[:-1], tokens.shape[-1], jnp.int32)
        (hidden,), (own,) = self._through_layers([(tokens, start, whole)], ancestors)
        return hidden, own

    def extend_levels(
        self, levels: Sequence[Level], *, ancestors: Sequence[Cache] = ()
    ) -> tuple[tuple[jax.Array, ...], tuple[Cache, ...]]:
        """Compute levels of the tree, each below those before it and the ancestors.

        Equal to `extend` on one after the other. Here a layer's weights are used for all levels
        before the next layer's: where they are spread over devices they are gathered once, and one
        gradient of them is made and not one for each level.

        Args:
            levels: from the top down; batch dimensions of each are a prefix of the next one's.
                Padding may hold any id: it is computed as token 0, since an id outside the
                vocabulary embeds as NaN.
            ancestors: levels above that are computed already.

        Returns:
            hidden [*B, T, D] of each level (final norm applied), and the levels' caches.
        """
        inputs, above = [], [cache.length for cache in ancestors]
        for level in levels:
            tokens, length = jnp.asarray(level.tokens), jnp.asarray(level.length)
            slots = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
            tokens = jnp.where(slots < length[..., None], tokens, 0)
            inputs.append((tokens, _total(above, length.shape), length))
            above.append(length)
        hidden, own = self._through_layers(inputs, ancestors)
        caches = (Cache(x.key, x.value, i[2]) for x, i in zip(own, inputs, strict=True))
        return hidden, tuple(caches)

    def _through_layers(
        self,
        levels: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
        ancestors: Sequence[Cache],
    ) -> tuple[tuple[jax.Array, ...], tuple[KeyValue, ...]]:
        """Compute levels of tokens [*B, T], start [*B] and true length [*B]."""
        turns = [
            rotation(
                start[..., None]
                + last_axis(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.ndim),
                self.config.rope_frequencies,
            )
            for tokens, start, _ in levels
        ]
        graph, layers = nnx.split(self.layers)

        def layer(xs: tuple, inputs: tuple) -> tuple[tuple, tuple[KeyValue, ...]]:
            weights, above = inputs
            block, parts = nnx.merge(graph, weights), _ancestor_parts(above, ancestors)
            after, own = [], []
            for x, turn, (_, _, length) in zip(xs, turns, levels, strict=True):
                query, key, value = block.project(x, turn)
                key, value = self._gathered(key, -1), self._gathered(value, -2)
                attended = attend(query, [*parts, Part(key, value)], spread=self.spread)
                after.append(self._shared(block.finish(x, attended)))
                own.append(KeyValue(key, value))
                parts.append(Part(key, value, length))
            return tuple(after), tuple(own)

        above = tuple(KeyValue(cache.key, cache.value) for cache in ancestors)
        xs, own = jax.lax.scan(
            self.remat.wrap(layer),
            tuple(self._shared(self._embedded(tokens)) for tokens, _, _ in levels),
            (layers, above),
            unroll=self.config.layers <= UNROLLED,
        )
        return tuple(map(self.norm, xs)), own

    def decode(
        self,
        tokens: jax.Array,
        *,
        step: jax.Array,
        start: jax.Array,
        ancestors: Sequence[Cache],
        own: KeyValue,
        layers: Sequence[nnx.State] | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Compute one token of every row, writing its key and value into the row's own cache.

        Args:
            tokens: [*B] int32, token number `step` of each row.
            step: int32 scalar, slot of the own cache to write; slots up to it are attended to.
            start: [*B] int32, position of slot 0 of each row's own cache.
            ancestors: as in `extend`, and what a row wrote itself before, B' = B; never copied per
                row. In a loop give `by_layer` of them.
            own: of `empty_cache`; in a loop updated in place.
            layers: `layer_weights()`, to be taken once before a loop.

        Returns:
            hidden [*B, D] and the updated own cache.
        """
        turn = rotation((start + step)[..., None], self.config.rope_frequencies)
        written = jnp.broadcast_to(step + 1, tokens.shape).astype(jnp.int32)
        graph, _ = nnx.split(self.layers)
        x, keys, values = self._embedded(tokens[..., None]), [], []
        for index, weights in enumerate(layers or self.layer_weights()):
            block = nnx.merge(graph, weights)
            query, key, value = block.project(x, turn)
            above = [KeyValue(cache.key[index], cache.value[index]) for cache in ancestors]
            keys.append(_write(own.key[index], key, step, axis=-1))
            values.append(_write(own.value[index], value, step, axis=-2))
            parts = [*_ancestor_parts(above, ancestors), Part(keys[-1], values[-1], written)]
            x = block.finish(x, attend(query, parts, spread=self.spread))
            # Else every layer adds up what all before it have added, anew.
            x = jax.lax.optimization_barrier(x)
        return self.norm(x)[..., 0, :], KeyValue(tuple(keys), tuple(values))

    def layer_weights(self) -> list[nnx.State]:
        """Return the weights of each layer by themselves."""
        _, stacked = nnx.split(self.layers)
        take = lambda layer: jax.tree.map(lambda x: x[layer], stacked)  # noqa: E731
        return [take(layer) for layer in range(self.config.layers)]

    def logits(
        self, hidden: jax.Array, *, questions: int | None = None, weight: jax.Array | None = None
    ) -> jax.Array:
        """[..., D] -> [..., V] in fp32 whatever the forward computes in.

        Args:
            hidden: final norm applied.
            questions: the axis of the questions, of rows that a mesh spreads. Then every device of
                a slice computes its part of the vocabulary for all of them: what moves are the
                rows, and not a head of a thousand times their size.
            weight: `head_weight()`, to be taken once before a loop.
        """
        if self.mesh is not None and questions is not None:
            names: list[str | None] = [None] * hidden.ndim
            names[questions] = "scored"
            where = NamedSharding(self.mesh, sharding.spec(tuple(names)))
            hidden = jax.lax.with_sharding_constraint(hidden, where)
        weight = self.head_weight() if weight is None else weight
        return product(hidden, weight.astype(hidden.dtype), jnp.float32)

    def head_weight(self) -> jax.Array:
        """Return the output projection [D, V]: the head, or the embedding transposed where tied.

        On a mesh the vocabulary is spread over all devices of a slice.
        """
        weight = self.embed[...].T if self.head is None else self.head[...]
        if self.mesh is None:
            return weight
        where = sharding.drawing_spec(("embed", "vocab"), weight.shape, self.mesh)
        return jax.lax.with_sharding_constraint(weight, NamedSharding(self.mesh, where))

    def empty_cache(self, batch: Sequence[int], length: int) -> KeyValue:
        """Return a zero own cache, for each layer of keys and values [K, *batch, ...].

        Where the model caches in int8, it is an `Int8` with a scale for each token and head.
        """
        config = self.config
        heads, size = (config.kv_heads, *batch), config.head_size

        def zeros(*shape: int, axis: int) -> tuple[jax.Array | Int8, ...]:
            whole = jnp.zeros((*heads, *shape), self.dtype)
            if self.cache is Quantisation.INT8:
                return (Int8.of(whole, axis=axis, dtype=self.dtype),) * config.layers
            return (whole,) * config.layers

        return KeyValue(zeros(size, length, axis=-2), zeros(length, size, axis=-1))

    def _random_head(self, rngs: nnx.Rngs) -> nnx.Param:
        shape = (self.config.width, self.config.vocab)
        draw = nnx.initializers.normal(self.config.width**-0.5)
        return sharding.param(draw(rngs.params(), shape, jnp.float32), ("embed", "vocab"))

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        return self.embed[...].astype(self.dtype)[tokens]

    def _shared(self, x: jax.Array) -> jax.Array:
        """Spread the positions of [N, *B, T, D] over the devices that share them, if any do."""
        if self.mesh is None or not sharding.shares_positions(self.mesh, x.shape[-2]):
            return x
        names: list[str | None] = [None] * x.ndim
        names[-2] = "position"
        if x.ndim > 3 and x.shape[1] % sharding.question_ways(self.mesh) == 0:
            names[1] = "question"
        return self._laid(x, sharding.spec(tuple(names)))

    def _gathered(self, x: jax.Array, axis: int) -> jax.Array:
        """Bring all positions of keys or values, which lie along an axis, to every device."""
        if self.mesh is None or not sharding.shares_positions(self.mesh, x.shape[axis]):
            return x
        axes: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        axes[axis] = None
        return self._laid(x, PartitionSpec(*axes))

    def _laid(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def end_of(ancestors: Sequence[Cache], shape: Sequence[int]) -> jax.Array:
    """Return [*shape] int32, the position behind the true tokens of all ancestors."""
    return _total([cache.length for cache in ancestors], shape)


def _total(lengths: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    """Add up lengths whose dimensions are beginnings of a shape."""
    total = jnp.zeros(shape, jnp.int32)
    for length in lengths:
        total += length.reshape(*length.shape, *[1] * (len(shape) - length.ndim))
    return total


def by_layer(caches: Sequence[Cache]) -> list[Cache]:
    """Return the caches with each layer's keys by themselves, for `Qwen.decode` in a loop."""
    return [Cache(tuple(cache.key), tuple(cache.value), cache.length) for cache in caches]


def abstract_qwen(
    config: ModelConfig,
    *,
    dtype: str | jnp.dtype = jnp.float32,
    remat: Remat = Remat.NONE,
    attention: Attention = Attention.AUTO,
) -> Qwen:
    """Return the model with shapes in place of arrays, to be filled: no memory, no random draws."""
    more = {"dtype": dtype, "remat": remat, "attention": attention}
    return nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0), **more))


def placed(model: Qwen, mesh: Mesh) -> Qwen:
    """Return the model as it computes on a mesh; the argument stays as it is."""
    model = nnx.merge(*nnx.split(model))
    model.mesh = mesh if mesh.size > 1 else None
    model.spread = Spread.on(mesh, model.attention)
    return model


def _ancestor_parts(above: Sequence[KeyValue], ancestors: Sequence[Cache]) -> list[Part]:
    """One layer's keys of each ancestor, with the length that hides the ancestor's padding."""
    return [
        Part(keys.key, keys.value, cache.length)
        for keys, cache in zip(above, ancestors, strict=True)
    ]


def _write(
    cache: jax.Array | Int8, new: jax.Array, step: jax.Array, *, axis: int
) -> jax.Array | Int8:
    """Put new keys or values, of one slot along an axis, into the cache at slot `step`."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=axis)
    # Of the last two axes one are the slots and one is a head's size.
    return jax.tree.map(put, cache, stored_as(cache, new, axis=-3 - axis))
