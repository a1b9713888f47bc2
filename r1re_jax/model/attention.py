"""Attention over a tree: one partial softmax per ancestor, merged by log-sum-exp.

A token attends to itself and what precedes it in its own row, and to every true token of its row's
ancestors. An ancestor's keys have fewer batch dimensions than the queries: all rows below it are
laid side by side as queries of one matrix product, so that the keys are read once and never copied
per row. The parts' softmaxes are merged as in online softmax (arXiv 1805.02867) and FlashAttention
(arXiv 2205.14135): with m = max, z = Σ exp(s − m), o = Σ exp(s − m) v per part, the whole is
Σ o·exp(m − M) / Σ z·exp(m − M), M the largest m.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Finite, so that a part whose keys are all masked (an empty guide) has weight exp(-1e30 - M) = 0,
# not exp(-inf + inf) = NaN. Every row has one real key at least: its own.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys and values of one level as seen by the queries.

    Attributes:
        key: [*B', S, K, A], B' a prefix of the queries' batch dimensions B.
        value: [*B', S, K, A].
        mask: bool, True where a query may look: [*B', 1, S] (the same for all rows below), or
            [*B, T, S] or [T, S] (B' = B only). What is hidden has weight 0 exactly, but must be
            finite (0 · NaN is NaN): padding is computed from real embeddings, so it is.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array


def attend(query: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Scaled dot-product attention of each query over the union of the parts' keys.

    Args:
        query: [*B, T, H, A]; head h reads key-value head h // (H/K).
        parts: at least one; every query must see at least one key.

    Returns:
        [*B, T, H, A] in the query's dtype; scores and softmax are fp32.
    """
    partials = [_partial(query, p.key, p.value, p.mask) for p in parts if p.key.size]
    maxima, sums, outputs = zip(*partials, strict=True)
    top = jax.lax.stop_gradient(jnp.stack(maxima).max(0))
    weights = [jnp.exp(m - top) for m in maxima]
    total = sum(z * w for z, w in zip(sums, weights, strict=True))
    merged = sum(o * w[..., None] for o, w in zip(outputs, weights, strict=True))
    return (merged / total[..., None]).astype(query.dtype)


# Scores are the largest arrays of the model: the backward pass computes them again.
# The layers' scan is unrolled, where the compiler could merge that with the forward pass: the
# default barrier against it stays.
@jax.checkpoint
def _partial(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return max [*B, T, H], Σexp [*B, T, H] and weighted values [*B, T, H, A] over one part.

    All rows below an ancestor are laid out as one matrix of queries per key-value head, so that
    both products are plain batched GEMMs and no score array is ever transposed.
    """
    *batch, tokens, heads, size = query.shape
    keys, kv_heads = key.shape[-3:-1]
    rows, group = math.prod(key.shape[:-3]), heads // kv_heads
    query_bktra = query.reshape(rows, -1, kv_heads, group, size).transpose(0, 2, 1, 3, 4)
    below = query_bktra.shape[2]
    query_bkqa = query_bktra.reshape(rows, kv_heads, below * group, size) * size**-0.5
    key_bksa = key.reshape(rows, keys, kv_heads, size).transpose(0, 2, 1, 3)
    value_bksa = value.reshape(rows, keys, kv_heads, size).transpose(0, 2, 1, 3)
    score_bkqs = jnp.einsum(
        "bkqa,bksa->bkqs", query_bkqa, key_bksa, preferred_element_type=jnp.float32
    )
    mask_bts = mask[None] if mask.ndim == 2 else mask.reshape(rows, -1, keys)
    if mask_bts.shape[1] > 1:  # one row per token: the heads of a group are neighbouring queries
        mask_bts = jnp.repeat(mask_bts, group, axis=1)
    score_bkqs = jnp.where(mask_bts[:, None], score_bkqs, MASKED)
    # The maximum only shifts the exponent: the result does not depend on it, nor does the gradient.
    top_bkq = jax.lax.stop_gradient(score_bkqs.max(-1))
    weight_bkqs = jnp.exp(score_bkqs - top_bkq[..., None])
    output_bkqa = jnp.einsum(
        "bkqs,bksa->bkqa",
        weight_bkqs.astype(value.dtype),
        value_bksa,
        preferred_element_type=jnp.float32,
    )

    def back(x_bkqa: jax.Array) -> jax.Array:
        x = x_bkqa.reshape(rows, kv_heads, below, group, -1).transpose(0, 2, 1, 3, 4)
        return x.reshape(*batch, tokens, heads, -1)

    return (
        back(top_bkq[..., None])[..., 0],
        back(weight_bkqs.sum(-1)[..., None])[..., 0],
        back(output_bkqa),
    )
