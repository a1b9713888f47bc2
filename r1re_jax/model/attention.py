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

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from r1re_jax.model.int8 import Int8
from r1re_jax.model.linear import last_axis
from r1re_jax.model.parts import Part, above, below
from r1re_jax.model.spread import Kernels, Spread

# Finite, so that a part whose keys are all masked (an empty guide) has weight exp(-1e30 - M) = 0,
# not exp(-inf + inf) = NaN. Every row has one real key at least: its own.
MASKED = -1e30
# Most scores that exist at a time, 4 MB of them: a processor's cache. Not fewer positions than
# SHORTEST, whatever the batch: matrix products of less are slow. A part of up to WHOLE scores
# is not cut: cutting copies the queries and what comes of them.
SCORES = 2**20
SHORTEST = 16
WHOLE = 2**22


def attend(query: jax.Array, parts: Sequence[Part], *, spread: Spread | None = None) -> jax.Array:
    """Scaled dot-product attention of each query over the union of the parts' keys.

    Args:
        query: [*B, T, H, A]; head h reads key-value head h // (H/K).
        parts: at least one; every query must see at least one key.
        spread: devices that share this out, and their kernels; None to leave both to XLA.

    Returns:
        [*B, T, H, A] in the query's dtype; scores and softmax are fp32.
    """
    parts = tuple(part for part in parts if part.key.size)
    *batch, tokens, heads, size = query.shape
    kv_heads = parts[0].key.shape[0]
    grouped = (query * size**-0.5).reshape(*batch, tokens, kv_heads, heads // kv_heads, size)
    # Heads first, group last: whatever the ancestor, its queries are a reshape and never a copy.
    first = jnp.moveaxis(grouped, -3, 0)
    if spread is not None and spread.suits(first.shape, parts):
        out_KBTgA = spread(_attend, first, parts)
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
    top, total, value = (above(x, query_KBtgA) for x in (top, weight.sum(-1, keepdims=True), value))
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
    q, g, log_sum, drift = (below(x, part) for x in (query, cotangent, lse, delta))
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
    queries, key = below(query_KBtgA, part), part.key
    # A slot's scale is taken out of the product, where it multiplies a number and not a row.
    if isinstance(key, Int8):
        score = _product(queries, key.value.astype(queries.dtype), part.batch, 1, 0) * key.scale
    else:
        score = _product(queries, key, part.batch, 1, 0)
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
    slots = jnp.arange(part.slots, dtype=jnp.int32)
    if part.length is None:
        own = jnp.arange(tokens, dtype=jnp.int32)
        own = own if part.first is None else own + part.first
        return slots[None, :] <= own[:, None]
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
