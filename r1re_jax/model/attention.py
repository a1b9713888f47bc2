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
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from r1re_jax.model.int8 import Int8

# Finite, so that a part whose keys are all masked (an empty guide) has weight exp(-1e30 - M) = 0,
# not exp(-inf + inf) = NaN. Every row has one real key at least: its own.
MASKED = -1e30
# Most scores that exist at a time, 4 MB of them: a processor's cache. Not fewer positions than
# SHORTEST, whatever the batch: matrix products of less are slow.
SCORES = 2**20
SHORTEST = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Keys and values of one level as seen by the queries.

    Attributes:
        key: [K, *B', S, A], B' a prefix of the queries' batch dimensions B. Int8 ones have a scale
            for each slot, and no gradient.
        value: [K, *B', S, A].
        mask: bool, True where a query may look: [*B', 1, S] (the same for all rows below), or
            [*B, T, S] or [T, S] (B' = B only). What is hidden has weight 0 exactly, but must be
            finite (0 · NaN is NaN): padding is computed from real embeddings, so it is.
    """

    key: jax.Array | Int8
    value: jax.Array | Int8
    mask: jax.Array

    @property
    def batch(self) -> int:
        """Leading dimensions that queries and keys share: the heads, and B'."""
        return self.key.ndim - 2


def attend(query: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Scaled dot-product attention of each query over the union of the parts' keys.

    Args:
        query: [*B, T, H, A]; head h reads key-value head h // (H/K).
        parts: at least one; every query must see at least one key.

    Returns:
        [*B, T, H, A] in the query's dtype; scores and softmax are fp32.
    """
    parts = tuple(part for part in parts if part.key.size)
    *batch, tokens, heads, size = query.shape
    kv_heads = parts[0].key.shape[0]
    grouped = (query * size**-0.5).reshape(*batch, tokens, kv_heads, heads // kv_heads, size)
    # Heads first, group last: whatever the ancestor, its queries are a reshape and never a copy.
    out_KBTgA = _attend(jnp.moveaxis(grouped, -3, 0), parts)
    return jnp.moveaxis(out_KBTgA, 0, -3).reshape(query.shape)


@jax.custom_vjp
def _attend(query_KBTgA: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
    """Attention of scaled queries; the group g are the heads that share a key-value head."""
    return _forward(query_KBTgA, parts)[0]


def _forward(query_KBTgA: jax.Array, parts: tuple[Part, ...]) -> tuple[jax.Array, tuple]:
    blocks = _Blocks.of(query_KBTgA, parts)

    def block(_: None, cut: tuple) -> tuple[None, tuple]:
        return None, _attend_block(*cut[0], blocks.parts(parts, cut[1]))

    _, (out, lse) = blocks.over(block, None, (query_KBTgA,), parts)
    out = out.astype(query_KBTgA.dtype)
    return out, (query_KBTgA, parts, out, lse)


def _backward(kept: tuple, cotangent_KBTgA: jax.Array) -> tuple[jax.Array, tuple]:
    query, parts, out, lse = kept
    blocks = _Blocks.of(query, parts)
    delta = jnp.sum(cotangent_KBTgA.astype(jnp.float32) * out, -1, keepdims=True)

    def block(total: tuple, cut: tuple) -> tuple[tuple, tuple]:
        arrays, masks = cut
        by_query, by_parts = _attend_block_backward(*arrays, blocks.parts(parts, masks))
        return jax.tree.map(jnp.add, total, by_parts), (by_query,)

    zero = tuple((_transposed_zeros(part.key), _transposed_zeros(part.value)) for part in parts)
    arrays = query, cotangent_KBTgA, lse, delta
    by_parts, (by_query,) = blocks.over(block, zero, arrays, parts)
    gradients = tuple(
        Part(
            jnp.swapaxes(by_key, -1, -2).astype(part.key.dtype),
            jnp.swapaxes(by_value, -1, -2).astype(part.value.dtype),
            None,
        )
        for part, (by_key, by_value) in zip(parts, by_parts, strict=True)
    )
    return by_query.astype(query.dtype), gradients


_attend.defvjp(_forward, _backward)


def _attend_block(query_KBtgA: jax.Array, parts: Sequence[Part]) -> tuple[jax.Array, jax.Array]:
    """Return the attention of a block's queries, and the log-sum-exp of their scores [..., 1]."""
    partials = []
    for part in parts:
        score = _masked_scores(query_KBtgA, part)
        # The maximum only shifts the exponent: the result does not depend on it.
        top = score.max(-1, keepdims=True)
        weight = jnp.exp(score - top)
        value = _product(weight.astype(part.value.dtype), part.value, part.batch, 1, 0)
        partials.append([_above(x, query_KBtgA) for x in (top, weight.sum(-1)[..., None], value)])
    largest = functools.reduce(jnp.maximum, [top for top, _, _ in partials])
    scales = [jnp.exp(top - largest) for top, _, _ in partials]
    total = sum(part[1] * scale for part, scale in zip(partials, scales, strict=True))
    merged = sum(part[2] * scale for part, scale in zip(partials, scales, strict=True))
    return merged / total, largest + jnp.log(total)


def _attend_block_backward(
    query: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    parts: Sequence[Part],
) -> tuple[jax.Array, tuple]:
    """Return the gradients of a block's queries, and of each part's key and value [..., A, S]."""
    by_query, by_parts = jnp.zeros(query.shape, jnp.float32), []
    for part in parts:
        q, g, log_sum, drift = (_below(x, part) for x in (query, cotangent, lse, delta))
        dtype, batch = part.value.dtype, part.batch
        weight = jnp.exp(_masked_scores(query, part) - log_sum)
        by_score = (weight * (_product(g, part.value, batch, 1, 1) - drift)).astype(dtype)
        # Small factor first: it is the first whose transpose a matrix product may have to write.
        by_value = _product(g, weight.astype(dtype), batch, 0, 0)
        by_key = _product(q, by_score, batch, 0, 0)
        by_query += _product(by_score, part.key, batch, 1, 0).reshape(query.shape)
        by_parts.append((by_key, by_value))
    return by_query, tuple(by_parts)


def _masked_scores(query_KBtgA: jax.Array, part: Part) -> jax.Array:
    """Return the scores of a block's queries, [K, *B', M, S] with M all that lie below a row."""
    score = _product(_below(query_KBtgA, part), part.key, part.batch, 1, 1)
    mask = part.mask
    if mask.shape[-2] > 1:  # one row per token: the heads of a group are neighbouring queries
        mask = jnp.repeat(mask, query_KBtgA.shape[-2], axis=-2)
    mask = mask.reshape(*[1] * (score.ndim - mask.ndim), *mask.shape)
    return jnp.where(mask, score, MASKED)


def _product(
    one: jax.Array, other: jax.Array | Int8, batch: int, axis: int, other_axis: int
) -> jax.Array:
    """Matrix product in fp32 over one of the last two axes of each, 0 or 1; the others remain."""
    if isinstance(other, Int8):
        # A slot's scale is taken out of the product, where it multiplies a number and not a row.
        scale, numbers = jnp.swapaxes(other.scale, -1, -2), other.value.astype(one.dtype)
        if other_axis == 1:
            return _product(one, numbers, batch, axis, other_axis) * scale
        return _product(one * scale, numbers, batch, axis, other_axis)
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


def _transposed_zeros(x_KbSA: jax.Array) -> jax.Array:
    return jnp.zeros((*x_KbSA.shape[:-2], x_KbSA.shape[-1], x_KbSA.shape[-2]), jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How query positions are cut into blocks.

    Attributes:
        count: of blocks.
        size: positions of a block; the last one is filled up.
        tokens: T, positions in all.
    """

    count: int
    size: int
    tokens: int

    @classmethod
    def of(cls, query_KBTgA: jax.Array, parts: Sequence[Part]) -> "_Blocks":
        tokens, widest = query_KBTgA.shape[-3], max(part.key.shape[-2] for part in parts)
        rows = math.prod(query_KBTgA.shape) // (tokens * query_KBTgA.shape[-1])
        count = -(-tokens // max(SCORES // (rows * widest), SHORTEST))
        return cls(count, -(-tokens // count), tokens)

    def over(self, block: Any, total: Any, arrays: tuple, parts: Sequence[Part]) -> tuple:
        """Scan `block` over the blocks: (total, (their arrays, their masks)) -> (total, results).

        Arrays and results are [K, *B, T, g, ...].
        """
        axis = arrays[0].ndim - 3
        masks = tuple(part.mask for part in parts if part.mask.shape[-2] > 1)
        if self.count == 1:
            return block(total, (arrays, masks))
        cut = tuple(self._cut(x, axis) for x in arrays), tuple(self._cut(x, -2) for x in masks)
        total, results = jax.lax.scan(block, total, cut)
        return total, tuple(self._join(x, axis) for x in results)

    def parts(self, parts: Sequence[Part], masks: Sequence[jax.Array]) -> list[Part]:
        """The parts as a block sees them: masks that differ from token to token are the block's."""
        left = iter(masks)
        return [
            dataclasses.replace(part, mask=next(left)) if part.mask.shape[-2] > 1 else part
            for part in parts
        ]

    def _cut(self, x: jax.Array, axis: int) -> jax.Array:
        axis %= x.ndim
        filling = [(0, 0)] * x.ndim
        filling[axis] = (0, self.count * self.size - self.tokens)
        x = jnp.pad(x, filling) if filling[axis][1] else x
        shape = (*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def _join(self, x: jax.Array, axis: int) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, self.tokens, axis=axis)
