"""Attention over a tree: one partial softmax per ancestor, merged by log-sum-exp.

A token attends to itself and what precedes it in its own row, and to every true token of its row's
ancestors. An ancestor's keys have fewer batch dimensions than the queries: all rows below it are
laid side by side as queries of one matrix product, so that the keys are read once and never copied
per row. The parts' softmaxes are merged as in online softmax (arXiv 1805.02867) and FlashAttention
(arXiv 2205.14135): with m = max, z = Σ exp(s − m), o = Σ exp(s − m) v per part, the whole is
Σ o·exp(m − M) / Σ z·exp(m − M), M the largest m.

Scores exist for a block of query positions at a time, in the backward pass too. That computes them
again from the merged log-sum-exp ℓ (arXiv 2205.14135, algorithm 4; here a part at a time): with
p = exp(s − ℓ), g the cotangent of the output o, and δ = g·o, ∂v = Σ p g and ∂s = p (g·v − δ).
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from r1re_jax import sharding
from r1re_jax.model import kernels as chip
from r1re_jax.model.int8 import Int8
from r1re_jax.model.linear import last_axis

# Finite, so that a part whose keys are all masked (an empty guide) has weight exp(-1e30 - M) = 0,
# not exp(-inf + inf) = NaN. Every row has one real key at least: its own.
MASKED = -1e30
# Most scores that exist at a time, 4 MB of them: a processor's cache. Not fewer positions than
# SHORTEST, whatever the batch: matrix products of less are slow. A part of up to WHOLE scores
# is not cut: cutting copies the queries and what comes of them.
SCORES = 2**20
SHORTEST = 16
WHOLE = 2**22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Keys and values of one level as seen by the queries.

    Attributes:
        key: [K, *B', A, S], B' a prefix of the queries' batch dimensions B; slots last, as their
            product with a few queries reads them. Int8 ones have a scale for each slot, and no
            gradient.
        value: [K, *B', S, A].
        length: [*B'] int32, the keys that all queries below a row see: its first so many. None for
            the queries' own row (B' = B, S = T), of which each sees those up to itself. What is
            hidden has weight 0 exactly, but must be finite (0 · NaN is NaN): padding is computed
            from real embeddings, so it is.
    """

    key: jax.Array | Int8
    value: jax.Array | Int8
    length: jax.Array | None = None

    @property
    def batch(self) -> int:
        """Leading dimensions that queries and keys share: the heads, and B'."""
        return self.key.ndim - 2

    @property
    def slots(self) -> int:
        """S, keys of a row."""
        return self.key.shape[-1]


class Attention(enum.StrEnum):
    """What computes attention."""

    AUTO = "auto"  # kernels on TPUs where they take a part, else XLA
    XLA = "xla"
    KERNELS = "kernels"  # on other devices they are interpreted: slow, and for tests


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Where attention is computed by the kernels of `r1re_jax.model.kernels`, and how.

    Attributes:
        mesh: that the arrays are spread over: heads over `tensor`, questions over the others.
        interpret: run the kernels on any device, slowly; head sizes may be any then.
    """

    mesh: Mesh
    interpret: bool = False

    @classmethod
    def on(cls, mesh: Mesh, way: Attention) -> "Kernels | None":
        """Return what computes attention on a mesh; None for XLA."""
        is_tpu = mesh.devices.flat[0].platform == "tpu"
        if way is Attention.XLA or (way is Attention.AUTO and not is_tpu):
            return None
        return cls(mesh, interpret=not is_tpu)

    def takes(self, shape: Sequence[int], part: Part) -> bool:
        """Whether a kernel computes a part for queries [K, *B, T, g, A]."""
        plain = not isinstance(part.key, Int8) and not isinstance(part.value, Int8)
        fits = shape[-1] % chip.LANES == 0 or self.interpret
        return plain and fits

    def forward(self, query_KBTgA: jax.Array, part: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what `_partial` does; the sum of weights is 1, and m their logarithm."""
        of, flat, length = self._flat(query_KBTgA, part)
        out, lse = chip.forward(flat(query_KBTgA), *_rows(part), length, of)
        top = _above(lse[..., None], query_KBTgA)
        return top, jnp.ones_like(top), _above(out, query_KBTgA)

    def backward(
        self,
        query: jax.Array,
        cotangent: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        part: Part,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the gradients of a part's key and value, and of the queries."""
        of, flat, length = self._flat(query, part)
        arrays = *_rows(part), length, flat(cotangent), flat(lse)[..., 0], flat(delta)[..., 0]
        by_key, by_value, by_query = chip.backward(flat(query), *arrays, of)
        by_key, by_value = by_key.reshape(part.key.shape), by_value.reshape(part.value.shape)
        return by_key, by_value, by_query.reshape(query.shape)

    def _flat(self, query: jax.Array, part: Part) -> tuple[chip.Shape, Any, jax.Array]:
        """Return the sizes, how queries become [K, B', M, X], and the lengths [B']."""
        heads, rows = query.shape[0], math.prod(query.shape[1 : part.batch])
        of = chip.Shape(
            heads=heads,
            rows=rows,
            queries=math.prod(query.shape[part.batch : -1]),
            slots=part.slots,
            size=query.shape[-1],
            group=query.shape[-2] if part.length is None else 0,
            interpret=self.interpret,
        )
        length = jnp.zeros(rows, jnp.int32) if part.length is None else part.length.reshape(rows)
        return of, lambda x: x.reshape(heads, rows, -1, x.shape[-1]), length

    def suit(self, shape: Sequence[int], parts: Sequence[Part]) -> bool:
        """Whether queries [K, *B, T, g, A] share out evenly, and a kernel takes a part."""
        local, axis = list(shape), self._questions(shape, parts)
        tensor, ways = self.mesh.shape["tensor"], sharding.question_ways(self.mesh)
        if local[0] % tensor or (axis is not None and local[1 + axis] % ways):
            return False
        local[0] //= tensor
        if axis is not None:
            local[1 + axis] //= ways
        return any(self.takes(local, part) for part in parts)

    def spread(self, function: Any, query: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
        """Return `function(query, parts, kernels)`, each device computing its own."""
        axis = self._questions(query.shape, parts)

        def spec(x: jax.Array, batch: int, *, heads: bool) -> PartitionSpec:
            """Of an array whose first dimensions are the heads, if it has them, and the batch."""
            names: list[str | None] = ["kv_heads"] * heads + [None] * (x.ndim - heads)
            if axis is not None and batch > axis:
                names[heads + axis] = "question"
            return sharding.spec(tuple(names))

        def of_part(part: Part) -> Part:
            batch = part.batch - 1
            length = None if part.length is None else spec(part.length, batch, heads=False)
            own = lambda x: spec(x, batch, heads=True)  # noqa: E731
            return Part(jax.tree.map(own, part.key), jax.tree.map(own, part.value), length)

        own = spec(query, query.ndim - 4, heads=True)
        return jax.shard_map(
            lambda query, parts: function(query, parts, self),
            mesh=self.mesh,
            in_specs=(own, tuple(map(of_part, parts))),
            out_specs=own,
            check_vma=False,
        )(query, parts)

    @staticmethod
    def _questions(shape: Sequence[int], parts: Sequence[Part]) -> int | None:
        """Return which batch dimension is that of the questions: the first below the guides.

        None at the guides' own level: every device has all of them.
        """
        guides = min(part.batch for part in parts) - 1
        return guides if guides < len(shape) - 4 else None


def attend(query: jax.Array, parts: Sequence[Part], *, kernels: Kernels | None = None) -> jax.Array:
    """Scaled dot-product attention of each query over the union of the parts' keys.

    Args:
        query: [*B, T, H, A]; head h reads key-value head h // (H/K).
        parts: at least one; every query must see at least one key.
        kernels: where and how to compute parts that suit a chip's kernels; None for by XLA.

    Returns:
        [*B, T, H, A] in the query's dtype; scores and softmax are fp32.
    """
    parts = tuple(part for part in parts if part.key.size)
    *batch, tokens, heads, size = query.shape
    kv_heads = parts[0].key.shape[0]
    grouped = (query * size**-0.5).reshape(*batch, tokens, kv_heads, heads // kv_heads, size)
    # Heads first, group last: whatever the ancestor, its queries are a reshape and never a copy.
    first = jnp.moveaxis(grouped, -3, 0)
    if kernels is not None and kernels.suit(first.shape, parts):
        out_KBTgA = kernels.spread(_attend, first, parts)
    else:
        out_KBTgA = _attend(first, parts, None)
    return jnp.moveaxis(out_KBTgA, 0, -3).reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(query_KBTgA: jax.Array, parts: tuple[Part, ...], kernels: Kernels | None) -> jax.Array:
    """Attention of scaled queries; the group g are the heads that share a key-value head."""
    return _forward(query_KBTgA, parts, kernels)[0]


def _forward(
    query_KBTgA: jax.Array, parts: tuple[Part, ...], kernels: Kernels | None
) -> tuple[jax.Array, tuple]:
    """Return the attention, and what the backward pass needs of it."""
    alone = lambda *block: (None, _partial(*block))  # noqa: E731
    partials = [
        kernels.forward(query_KBTgA, part)
        if kernels is not None and kernels.takes(query_KBTgA.shape, part)
        else _over_blocks(alone, (query_KBTgA,), part)[1]
        for part in parts
    ]
    largest = functools.reduce(jnp.maximum, [top for top, _, _ in partials])
    scales = [jnp.exp(top - largest) for top, _, _ in partials]
    total = sum(part[1] * scale for part, scale in zip(partials, scales, strict=True))
    merged = sum(part[2] * scale for part, scale in zip(partials, scales, strict=True))
    out = (merged / total).astype(query_KBTgA.dtype)
    return out, (query_KBTgA, parts, out, largest + jnp.log(total))


def _backward(
    kernels: Kernels | None, kept: tuple, cotangent_KBTgA: jax.Array
) -> tuple[jax.Array, tuple]:
    """Return the gradients of queries and parts: each part's own, given the merged softmax."""
    query, parts, out, lse = kept
    delta = jnp.sum(cotangent_KBTgA.astype(jnp.float32) * out, -1, keepdims=True)
    arrays, by_query, by_parts = (query, cotangent_KBTgA, lse, delta), 0.0, []
    for part in parts:
        if kernels is not None and kernels.takes(query.shape, part):
            by_key, by_value, mine = kernels.backward(*arrays, part)
        else:
            zero = (jnp.zeros(part.key.shape, jnp.float32),) * 2
            (by_key, by_value), (mine,) = _over_blocks(_partial_backward, arrays, part, zero)
            by_value = jnp.swapaxes(by_value, -1, -2)
        by_query += mine
        types = part.key.dtype, part.value.dtype
        by_parts.append(Part(by_key.astype(types[0]), by_value.astype(types[1])))
    return by_query.astype(query.dtype), tuple(by_parts)


_attend.defvjp(_forward, _backward)


def _partial(
    query_KBtgA: jax.Array, part: Part, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return m, z [K, *B, t, g, 1] and o [K, *B, t, g, A] of a block's queries over a part."""
    score = _masked_scores(query_KBtgA, part, mask)
    # The maximum only shifts the exponent: the result does not depend on it.
    top = score.max(-1, keepdims=True)
    weight = jnp.exp(score - top)
    value = _product(*_weighted(weight.astype(part.value.dtype), part.value), part.batch, 1, 0)
    top, total, value = (
        _above(x, query_KBtgA) for x in (top, weight.sum(-1, keepdims=True), value)
    )
    return top, total, value


def _partial_backward(
    query: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    part: Part,
    mask: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array]]:
    """Return the gradients of a part's key and value [..., A, S], and of a block's queries."""
    q, g, log_sum, drift = (_below(x, part) for x in (query, cotangent, lse, delta))
    dtype, batch = part.value.dtype, part.batch
    weight = jnp.exp(_masked_scores(query, part, mask) - log_sum)
    by_score = (weight * (_product(g, part.value, batch, 1, 1) - drift)).astype(dtype)
    # Small factor first: it is the first whose transpose a matrix product may have to write.
    by_value = _product(g, weight.astype(dtype), batch, 0, 0)
    by_key = _product(q, by_score, batch, 0, 0)
    by_query = _product(by_score, part.key, batch, 1, 1).reshape(query.shape)
    return (by_key, by_value), (by_query,)


def _masked_scores(query_KBtgA: jax.Array, part: Part, mask: jax.Array) -> jax.Array:
    """Return the scores of a block's queries, [K, *B', M, S] with M all that lie below a row."""
    below, key = _below(query_KBtgA, part), part.key
    # A slot's scale is taken out of the product, where it multiplies a number and not a row.
    if isinstance(key, Int8):
        score = _product(below, key.value.astype(below.dtype), part.batch, 1, 0) * key.scale
    else:
        score = _product(below, key, part.batch, 1, 0)
    if mask.shape[-2] > 1:  # one row per token: the heads of a group are neighbouring queries
        mask = jnp.repeat(mask, query_KBtgA.shape[-2], axis=-2)
    mask = mask.reshape(*[1] * (score.ndim - mask.ndim), *mask.shape)
    return jnp.where(mask, score, MASKED)


def _weighted(weight_KbMS: jax.Array, value_KbSA: jax.Array | Int8) -> tuple[jax.Array, jax.Array]:
    """Return weights and values for their product; a slot's scale goes to its weight."""
    if isinstance(value_KbSA, Int8):
        scale = jnp.swapaxes(value_KbSA.scale, -1, -2)
        return weight_KbMS * scale, value_KbSA.value.astype(weight_KbMS.dtype)
    return weight_KbMS, value_KbSA


def _product(one: jax.Array, other: jax.Array, batch: int, axis: int, other_axis: int) -> jax.Array:
    """Matrix product in fp32 over one of the last two axes of each, 0 or 1; the others remain."""
    shared = tuple(range(batch))
    contracted = ((batch + axis,), (batch + other_axis,))
    return jax.lax.dot_general(
        one, other, (contracted, (shared, shared)), preferred_element_type=jnp.float32
    )


def _below(x_KBtgX: jax.Array, part: Part) -> jax.Array:
    """Lay what lies below each of a part's rows side by side: [K, *B', M, X]."""
    return x_KBtgX.reshape(*part.key.shape[: part.batch], -1, x_KBtgX.shape[-1])


def _above(x_KbMX: jax.Array, query_KBtgA: jax.Array) -> jax.Array:
    """The inverse of `_below`: [K, *B, t, g, X]."""
    return x_KbMX.reshape(*query_KBtgA.shape[:-1], x_KbMX.shape[-1])


def _rows(part: Part) -> tuple[jax.Array, jax.Array]:
    """Return keys and values with their batch dimensions in one, [K, B', ...]."""
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])  # noqa: E731
    return flat(part.key), flat(part.value)


def _over_blocks(block: Any, arrays: tuple, part: Part, zero: Any = None) -> tuple[Any, tuple]:
    """Return (sums, arrays) of `block(*arrays, part, mask)`, a block of positions at a time.

    Sums begin with `zero`. Blocks are of one part's scores: another part may be cut otherwise.
    Arrays given and returned are [K, *B, T, g, ...]; a mask that differs from position to position
    is cut with them.
    """
    axis = arrays[0].ndim - 3
    tokens, scores = arrays[0].shape[axis], math.prod(arrays[0].shape[:-1]) * part.slots
    mask = _mask(part, tokens)
    count = -(-tokens // max(SCORES * tokens // scores, SHORTEST))
    if count == 1 or scores <= WHOLE:
        return block(*arrays, part, mask)
    size = -(-tokens // count)

    def step(total: Any, cut: tuple) -> tuple[Any, tuple]:
        arrays, own = cut
        sums, results = block(*arrays, part, mask if own is None else own)
        return jax.tree.map(jnp.add, total, sums), results

    cut = lambda x, axis: _cut(x, axis, count, size)  # noqa: E731
    pieces = tuple(cut(x, axis) for x in arrays), cut(mask, -2) if part.length is None else None
    total, results = jax.lax.scan(step, zero, pieces)
    return total, tuple(_join(x, axis, tokens) for x in results)


def _mask(part: Part, tokens: int) -> jax.Array:
    """Return where a query may look: [*B', 1, S], or [T, S] of the queries' own row."""
    if part.length is None:
        return jnp.tril(jnp.ones((tokens, part.slots), bool))
    slots = jnp.arange(part.slots, dtype=jnp.int32)
    seen = last_axis(slots, part.length.ndim + 1) < part.length[..., None]
    return seen[..., None, :]


def _cut(x: jax.Array, axis: int, count: int, size: int) -> jax.Array:
    """Cut an axis into blocks, filled up by zeros: [count, ..., size, ...]."""
    axis %= x.ndim
    filling = [(0, 0)] * x.ndim
    filling[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, filling) if filling[axis][1] else x
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: jax.Array, axis: int, tokens: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, tokens, axis=axis)
