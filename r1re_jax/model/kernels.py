"""Attention over one part as Pallas kernels for TPUs: forward, and both halves of the backward.

What XLA computes in blocks of scores that go through the memory stays on the chip here
(FlashAttention-2, arXiv 2307.08691): a block of scores, keys by queries [s, m], is made, used and
forgotten. Keys lie along the first axis, so that what belongs to a query (its largest score, its
sum) is a row of numbers and needs no transposing.

A program is a grid of steps that run in order, the last axis fastest; what sums over it is kept in
scratch memory. Blocks of keys that no query of a block sees are neither read nor computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# As in r1re_jax.model.attention: weight exp(MASKED - m) is 0 exactly, and no NaN.
MASKED = -1e30
# Most queries and keys of a block: 1 MB of scores, of a chip's 16 MB and more.
BLOCK = 512
LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a part's kernels are compiled for.

    Attributes:
        heads: key-value heads.
        rows: B' of the part, flat.
        queries: M, below each row.
        slots: S, keys of each row.
        size: A.
        group: g queries in turn belong to one token, which sees keys up to its own, the first's
            being number `length`; 0: all queries see the row's first `length` keys.
        interpret: run on any device, slowly.
    """

    heads: int
    rows: int
    queries: int
    slots: int
    size: int
    group: int
    interpret: bool

    @property
    def block(self) -> tuple[int, int]:
        """Keys and queries of a block."""
        return min(BLOCK, self.slots), min(BLOCK, self.queries)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of keys and of queries."""
        keys, queries = self.block
        return -(-self.slots // keys), -(-self.queries // queries)

    def seen(self, length: jax.Array, query: jax.Array) -> jax.Array:
        """Return how many keys some queries see at most: those of block number `query`."""
        if not self.group:
            return length
        last = (query + 1) * self.block[1] - 1
        return jnp.minimum(length + last // self.group + 1, self.slots)

    def seeing(self, length: jax.Array, key: jax.Array) -> jax.Array:
        """Return the first block of queries that sees some keys: those of block number `key`."""
        if not self.group:
            return jnp.zeros_like(key)
        keys, queries = self.block
        first = jnp.maximum(key * keys - length, 0) * self.group // queries
        return jnp.minimum(first, self.blocks[1] - 1)

    @property
    def share(self) -> float:
        """Scores that are computed, of all; of several devices' queries those of the last."""
        return 1 - self.queries / self.group / self.slots / 2 if self.group else 1.0


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array, of: Shape
) -> tuple[jax.Array, jax.Array]:
    """Attention over a part, and the logarithm of each query's sum of weights.

    Args:
        query: [K, B', M, A], scaled.
        key: [K, B', A, S].
        value: [K, B', S, A].
        length: [B'] int32, keys that are seen where `of.group` is 0; else the first token's number.
        of: their sizes.

    Returns:
        [K, B', M, A] fp32, normalised, and [K, B', M] fp32; 0 and `MASKED` of a query without keys.
    """
    keys, queries = of.block
    call = _call(
        functools.partial(_forward_kernel, of=of),
        of,
        inputs="qkv",
        outputs=[("q", jnp.float32), ("r", jnp.float32)],
        scratch=[(1, queries), (1, queries), (of.size, queries)],
        products=2,
    )
    out, lse = call(length, query, key, value)
    return out, lse[..., 0, :]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    length: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    of: Shape,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of a part's keys, values and queries, given the merged softmax.

    Args:
        query: as of `forward`.
        key: as of `forward`.
        value: as of `forward`.
        length: as of `forward`.
        cotangent: of the merged output, [K, B', M, A].
        lse: of all parts together, [K, B', M] fp32.
        delta: cotangent · output, [K, B', M] fp32.
        of: their sizes.

    Returns:
        [K, B', A, S], [K, B', S, A] and [K, B', M, A], fp32.
    """
    keys, queries = of.block
    arrays = length, query, key, value, cotangent, lse[..., None, :], delta[..., None, :]
    shared = {"inputs": "qkvqrr"}
    by_query = _call(
        functools.partial(_query_kernel, of=of),
        of,
        outputs=[("q", jnp.float32)],
        scratch=[(of.size, queries)],
        products=3,
        **shared,
    )
    by_keys = _call(
        functools.partial(_key_kernel, of=of),
        of,
        outputs=[("k", jnp.float32), ("v", jnp.float32)],
        scratch=[(of.size, keys), (keys, of.size)],
        products=4,
        queries_last=True,
        **shared,
    )
    (found,) = by_query(*arrays)
    return *by_keys(*arrays), found


def _call(
    kernel: Callable,
    of: Shape,
    *,
    inputs: str,
    outputs: list[tuple[str, Any]],
    scratch: list[tuple[int, int]],
    products: int,
    queries_last: bool = False,
) -> Callable:
    """Return the call of a kernel over heads and rows, blocks of queries and blocks of keys.

    Arrays are queries, keys, values, or a row of numbers, one for each query, by their first
    letters. `products` of the scores' size are what the compiler is told that it costs;
    `queries_last` sums over queries and not over keys.
    """
    keys, queries = of.block
    key_blocks, query_blocks = of.blocks

    def places(row: Any, outer: Any, inner: Any, length: Any) -> tuple[Any, Any]:
        """Return numbers of the block of queries and of keys; nothing unseen is read."""
        query, key = (inner, outer) if queries_last else (outer, inner)
        if queries_last:
            return jnp.maximum(query, of.seeing(length[row % of.rows], key)), key
        seen = of.seen(length[row % of.rows], query)
        return query, jnp.minimum(key, jnp.maximum(seen - 1, 0) // keys)

    def spec(kind: str) -> pl.BlockSpec:
        def where(row: Any, outer: Any, inner: Any, length: Any) -> tuple[Any, ...]:
            query, key = places(row, outer, inner, length)
            head, row = row // of.rows, row % of.rows
            return (
                head,
                row,
                *{"q": (query, 0), "k": (0, key), "v": (key, 0), "r": (0, query)}[kind],
            )

        block = {"q": (queries, of.size), "k": (of.size, keys), "v": (keys, of.size)}
        return pl.BlockSpec((None, None, *{**block, "r": (1, queries)}[kind]), where)

    whole = {
        "q": (of.queries, of.size),
        "k": (of.size, of.slots),
        "v": (of.slots, of.size),
        "r": (1, of.queries),
    }
    blocks = (key_blocks, query_blocks) if queries_last else (query_blocks, key_blocks)
    scores = of.heads * of.rows * of.queries * of.slots * of.share
    moved = sum(
        of.heads * of.rows * whole[kind][0] * whole[kind][1] * size
        for kind, size in [*((kind, 2) for kind in inputs), *((kind, 4) for kind, _ in outputs)]
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(of.heads * of.rows, *blocks),
            in_specs=[spec(kind) for kind in inputs],
            out_specs=[spec(kind) for kind, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((of.heads, of.rows, *whole[kind]), dtype)
            for kind, dtype in outputs
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * products * scores * of.size),
            transcendentals=int(scores),
            bytes_accessed=int(moved),
        ),
        interpret=of.interpret,
    )


def _forward_kernel(
    length_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    top_ref: Any,
    total_ref: Any,
    sum_ref: Any,
    *,
    of: Shape,
) -> None:
    length = length_ref[pl.program_id(0) % of.rows]
    query, key = pl.program_id(1), pl.program_id(2)

    @pl.when(key == 0)
    def _begin() -> None:
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(key * of.block[0] < of.seen(length, query))
    def _add() -> None:
        score, seen = _scores(query_ref[...], key_ref[...], length, query, key, of)
        score = jnp.where(seen, score, MASKED)
        top = jnp.maximum(top_ref[...], jnp.max(score, 0, keepdims=True))
        weight = jnp.where(seen, jnp.exp(score - top), 0.0)
        scale = jnp.exp(top_ref[...] - top)
        value = _real_key(value_ref[...], key, of, axis=0)
        total_ref[...] = total_ref[...] * scale + jnp.sum(weight, 0, keepdims=True)
        sum_ref[...] = sum_ref[...] * scale + _dot(value, weight.astype(value.dtype), 0, 0)
        top_ref[...] = top

    @pl.when(key == pl.num_programs(2) - 1)
    def _end() -> None:
        total = total_ref[...]
        some = jnp.where(total == 0.0, 1.0, total)
        out_ref[...] = (sum_ref[...] / some).T
        lse_ref[...] = jnp.where(total == 0.0, MASKED, top_ref[...] + jnp.log(some))


def _query_kernel(
    length_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    cotangent_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    by_query_ref: Any,
    sum_ref: Any,
    *,
    of: Shape,
) -> None:
    length = length_ref[pl.program_id(0) % of.rows]
    query, key = pl.program_id(1), pl.program_id(2)

    @pl.when(key == 0)
    def _begin() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(key * of.block[0] < of.seen(length, query))
    def _add() -> None:
        refs = query_ref, key_ref, value_ref, cotangent_ref, lse_ref, delta_ref
        _, by_score = _score_gradient(refs, length, query, key, of)
        sum_ref[...] += _dot(_real_key(key_ref[...], key, of, axis=1), by_score, 1, 0)

    @pl.when(key == pl.num_programs(2) - 1)
    def _end() -> None:
        by_query_ref[...] = sum_ref[...].T


def _key_kernel(
    length_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    cotangent_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    by_key_ref: Any,
    by_value_ref: Any,
    key_sum_ref: Any,
    value_sum_ref: Any,
    *,
    of: Shape,
) -> None:
    length = length_ref[pl.program_id(0) % of.rows]
    key, query = pl.program_id(1), pl.program_id(2)

    @pl.when(query == 0)
    def _begin() -> None:
        key_sum_ref[...] = jnp.zeros_like(key_sum_ref)
        value_sum_ref[...] = jnp.zeros_like(value_sum_ref)

    @pl.when(key * of.block[0] < of.seen(length, query))
    def _add() -> None:
        refs = query_ref, key_ref, value_ref, cotangent_ref, lse_ref, delta_ref
        weight, by_score = _score_gradient(refs, length, query, key, of)
        queries, cotangents = (
            _real_query(ref[...], query, of) for ref in (query_ref, cotangent_ref)
        )
        key_sum_ref[...] += _dot(queries, by_score, 0, 1)
        value_sum_ref[...] += _dot(weight.astype(cotangents.dtype), cotangents, 1, 0)

    @pl.when(query == pl.num_programs(2) - 1)
    def _end() -> None:
        by_key_ref[...] = key_sum_ref[...]
        by_value_ref[...] = value_sum_ref[...]


def _score_gradient(
    refs: tuple, length: Any, query: Any, key: Any, of: Shape
) -> tuple[jax.Array, jax.Array]:
    """Return a block's weights, fp32, and the gradient of its scores, both [s, m]."""
    query_ref, key_ref, value_ref, cotangent_ref, lse_ref, delta_ref = refs
    score, seen = _scores(query_ref[...], key_ref[...], length, query, key, of)
    weight = jnp.where(seen, jnp.exp(score - lse_ref[...]), 0.0)
    value = _real_key(value_ref[...], key, of, axis=0)
    by_score = weight * (_dot(value, cotangent_ref[...], 1, 1) - delta_ref[...])
    # Beyond the last query all may be NaN, and 0 · NaN is NaN.
    return weight, jnp.where(seen, by_score, 0.0).astype(query_ref.dtype)


def _scores(
    query: jax.Array, key: jax.Array, length: Any, at_query: Any, at_key: Any, of: Shape
) -> tuple[jax.Array, jax.Array]:
    """Return a block's scores [s, m], and which of them are seen."""
    keys, queries = of.block
    score = _dot(key, query, 0, 1)
    slot = at_key * keys + jax.lax.broadcasted_iota(jnp.int32, score.shape, 0)
    number = at_query * queries + jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    seen = slot <= length + number // of.group if of.group else slot < length
    return score, seen if of.queries % queries == 0 else seen & (number < of.queries)


def _real_key(x: jax.Array, at_key: Any, of: Shape, *, axis: int) -> jax.Array:
    """Zero what a block of keys has beyond the last slot: 0 · NaN is NaN."""
    return _real(x, at_key, of.block[0], of.slots, axis=axis)


def _real_query(x: jax.Array, at_query: Any, of: Shape) -> jax.Array:
    """Likewise of a block of queries."""
    return _real(x, at_query, of.block[1], of.queries, axis=0)


def _real(x: jax.Array, block: Any, size: int, whole: int, *, axis: int) -> jax.Array:
    """Zero what lies beyond the `whole` of an array that is cut into blocks of a size."""
    if whole % size == 0:
        return x
    number = block * size + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(number < whole, x, jnp.zeros_like(x))


def _dot(one: jax.Array, other: jax.Array, axis: int, other_axis: int) -> jax.Array:
    """Matrix product in fp32 over one axis of each."""
    dimensions = (((axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(one, other, dimensions, preferred_element_type=jnp.float32)
