"""Merged partial softmaxes equal one float64 softmax over all keys, in value and gradient."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1re_jax.model import attention
from r1re_jax.model.attention import attend
from r1re_jax.model.parts import Part

# Few shapes, as each is compiled; lengths and masks vary under each.
SHAPES = [
    dict(trees=2, questions=3, tokens=4, kv_heads=2, groups=3, guide=5, row=3),
    dict(trees=2, questions=2, tokens=1, kv_heads=1, groups=4, guide=3, row=2),  # decoding
    dict(trees=1, questions=1, tokens=3, kv_heads=3, groups=1, guide=0, row=4),  # no guide
    dict(trees=1, questions=2, tokens=2, kv_heads=1, groups=1, guide=0, row=0),  # no ancestors
]


def length_of(mask: np.ndarray) -> jax.Array | None:
    """Return how many keys a mask of the first ones shows; None for the causal one."""
    return None if mask.ndim == 2 else jnp.sum(mask[..., 0, :], -1, dtype=jnp.int32)


@jax.jit
def attended(query: jax.Array, arrays: list, masks: list) -> jax.Array:
    """Run the code under test."""
    first = lambda x: jnp.moveaxis(x, -2, 0)  # noqa: E731  the heads
    parts = [
        Part(jnp.swapaxes(first(key), -1, -2), first(value), length_of(mask))
        for (key, value), mask in zip(arrays, masks, strict=True)
    ]
    return attend(query, parts)


@jax.jit
def gradients(query: jax.Array, arrays: list, masks: list, cotangent: jax.Array) -> tuple:
    """Return the result and its gradients with respect to the query and to all keys and values."""
    out, pull = jax.vjp(lambda q, a: attended(q, a, masks), query, arrays)
    return out, *pull(cotangent)


class Case:
    """Random queries, and three parts as the tree has them: of the tree, of the row, causal."""

    def __init__(
        self,
        *,
        trees: int = 1,
        questions: int = 2,
        tokens: int = 3,
        kv_heads: int = 2,
        groups: int = 2,
        guide: int = 4,
        row: int = 3,
        seed: int = 0,
        size: int = 4,
    ) -> None:
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        batch = (trees, questions)
        self.query = normal(*batch, tokens, kv_heads * groups, size)
        self.arrays = [
            (normal(*lead, keys, kv_heads, size), normal(*lead, keys, kv_heads, size))
            for lead, keys in (((trees,), guide), (batch, row), (batch, tokens))
        ]
        # A length of 0 masks the whole part.
        guide_length = rng.integers(0, guide + 1, size=trees)
        row_length = rng.integers(0, row + 1, size=batch)
        self.masks = [
            (np.arange(guide) < guide_length[:, None])[:, None],
            (np.arange(row) < row_length[..., None])[..., None, :],
            np.tril(np.ones((tokens, tokens), bool)),
        ]
        self.cotangent = normal(*self.query.shape)

    def attended(self) -> jax.Array:
        """Return the result of the code under test."""
        return attended(self.query, self.arrays, self.masks)

    def gradients(self) -> tuple:
        """Return the result and the gradients of the code under test."""
        return gradients(self.query, self.arrays, self.masks, self.cotangent)

    def oracle(self) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Value and gradients in float64, one query and one head at a time.

        With w = softmax(s) over all visible keys and the output's cotangent g: ∂v_i = w_i g and
        ∂s_i = w_i (v_i − Σ w v)·g.
        """
        query = self.query.astype(np.float64)
        arrays = [(key.astype(np.float64), value.astype(np.float64)) for key, value in self.arrays]
        out, by_query = np.zeros(query.shape), np.zeros(query.shape)
        by_arrays = [(np.zeros_like(key), np.zeros_like(value)) for key, value in arrays]
        *batch, heads, size = query.shape
        for n, p, t, h in np.ndindex(*batch, heads):
            k = h // (heads // arrays[0][0].shape[-2])
            seen = [self.masks[0][n, 0], self.masks[1][n, p, 0], self.masks[2][t]]
            where = [
                (*lead, np.flatnonzero(rows), k)
                for lead, rows in zip(((n,), (n, p), (n, p)), seen, strict=True)
            ]
            key, value = (
                np.concatenate([part[i][at] for part, at in zip(arrays, where, strict=True)])
                for i in (0, 1)
            )
            at = (n, p, t, h)
            score = key @ query[at] / np.sqrt(size)
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            out[at] = weight @ value
            by_score = weight * ((value - out[at]) @ self.cotangent[at]) / np.sqrt(size)
            by_query[at] = by_score @ key
            ends = np.cumsum([rows.sum() for rows in seen])[:-1]
            for part, index, ds, w in zip(
                by_arrays, where, np.split(by_score, ends), np.split(weight, ends), strict=True
            ):
                part[0][index] += ds[:, None] * query[at]
                part[1][index] += w[:, None] * self.cotangent[at]
        return out, by_query, by_arrays


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_value_and_gradients_equal_one_softmax_over_all_keys(shape: dict, seed: int) -> None:
    case = Case(**shape, seed=seed)
    found, expected = case.gradients(), case.oracle()
    assert found[0].shape == case.query.shape and found[0].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=5e-5)


@pytest.mark.parametrize("scores", [1, 300, 500])
def test_blocks_change_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one position, of some that do not divide the tokens, and of more."""
    case = Case(tokens=7, guide=9, trees=2)
    cuts = []

    def recorded(x: jax.Array, axis: int, count: int, size: int) -> jax.Array:
        cuts.append((count, size))
        return cut(x, axis, count, size)

    cut = attention._cut
    monkeypatch.setattr(attention, "_cut", recorded)
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "SHORTEST", 1)
    monkeypatch.setattr(attention, "WHOLE", 0)
    jax.clear_caches()
    found, expected = case.gradients(), case.oracle()
    jax.clear_caches()
    # Of the guide's 9 keys, the row's 3 and the 7 of its own; 16 scores a key and position.
    blocks = {1: {(7, 1)}, 300: {(4, 2), (2, 4)}, 500: {(3, 3), (2, 4)}}
    assert set(cuts) == blocks[scores]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=5e-5)


def test_parts_that_are_wholly_masked_have_weight_zero() -> None:
    case = Case()
    case.masks[0][:] = case.masks[1][:] = False
    found, expected = case.gradients(), case.oracle()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=5e-5)


def test_masked_keys_have_no_influence_and_no_gradient() -> None:
    case = Case()
    case.masks[0][:] = False
    case.masks[1][..., 1:] = False
    out, by_query, _ = case.gradients()
    for array in case.arrays[0]:
        array[:] = 1e4
    for array in case.arrays[1]:
        array[..., 1:, :, :] = -1e4
    same_out, same_by_query, by_arrays = case.gradients()
    np.testing.assert_array_equal(same_out, out)
    np.testing.assert_array_equal(same_by_query, by_query)
    for array in by_arrays[0]:
        assert not np.any(array)
    for array in by_arrays[1]:
        assert not np.any(array[..., 1:, :, :])
        assert np.any(array[..., :1, :, :])


def test_large_scores_do_not_overflow() -> None:
    case = Case()
    case.query *= 1e3
    np.testing.assert_allclose(case.attended(), case.oracle()[0], atol=1e-3, rtol=1e-3)


def test_the_split_into_parts_does_not_matter() -> None:
    case = Case(row=6, guide=0)
    case.masks[1][:] = True
    whole = case.attended()
    (key, value), own = case.arrays[1:]
    seen = np.ones((1, 2, 1, 3), bool)
    arrays = [own, (key[:, :, 3:], value[:, :, 3:]), (key[:, :, :3], value[:, :, :3])]
    np.testing.assert_allclose(
        attended(case.query, arrays, [case.masks[2], seen, seen]), whole, atol=1e-6
    )


def test_bfloat16_keeps_its_dtype_and_sums_in_fp32() -> None:
    case = Case(guide=64)
    case.masks[0][:] = True
    expected = case.oracle()[0]
    case.query, case.arrays = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (case.query, case.arrays)
    )
    found = case.attended()
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.03)


def shapes(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """Yield the shape of every intermediate, also inside nested calls."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from shapes(value.jaxpr)
        yield from (out.aval.shape for out in equation.outvars)


def test_keys_are_not_copied_per_row() -> None:
    """No intermediate holds the guide's keys, 2 heads of size 6, once per question."""
    case = Case(questions=7, guide=50, size=6)

    def largest(function: Callable) -> int:
        jaxpr = jax.make_jaxpr(function)(case.query, case.arrays, case.masks).jaxpr
        return max((math.prod(s) for s in shapes(jaxpr) if 50 in s and 6 in s), default=0)

    copying = lambda q, arrays, m: jnp.repeat(arrays[0][0], 7, axis=0)  # noqa: E731
    assert largest(copying) == 7 * 50 * 2 * 6
    assert largest(attended) <= 50 * 2 * 6
