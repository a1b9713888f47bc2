"""The tree computes what flat rows compute: log-probabilities, entropies, gradients, causality.

The oracle is `tests.oracles.flat_qwen` in float64: what differs is the fp32 error of the tree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.config import Family, ModelConfig, RopeScaling
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.scoring import completion_logp
from tests.drawn import drawn_model, small_config
from tests.oracles import flat_qwen

P, G, S, Q, C = 2, 3, 7, 4, 5
VOCAB = 61


@functools.cache
def make_model(*, tied: bool) -> Qwen:
    return drawn_model(small_config(vocab=VOCAB, rope_theta=100.0, tied=tied))


def make_tree(seed: int, *, trees: int = 2) -> Tree:
    """Ragged in every level, with questions of one token, completions of none and of all C.

    The padding holds random ids, so that anything that reads it gives another result.
    """
    rng = np.random.default_rng(seed)

    def level(least: int, *shape: int) -> Level:
        length = rng.integers(least, shape[-1] + 1, shape[:-1])
        return Level(rng.integers(0, VOCAB, shape).astype(np.int32), length.astype(np.int32))

    tree = Tree(level(1, trees, S), level(1, trees, P, Q), level(0, trees, P, G, C))
    tree.question.length[0, 0] = 1
    tree.completion.length[0, 0] = [0, 1, C]
    return tree


# The other families; the scaled frequencies turn once in four to sixteen tokens, the tree in many.
FAMILIES = {
    "qwen3": small_config(vocab=VOCAB, rope_theta=100.0, family=Family.QWEN3),
    "llama3.1": small_config(
        vocab=VOCAB,
        rope_theta=6.0,
        family=Family.LLAMA,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=0.25, high_freq_factor=1.0, original_context=4
        ),
    ),
}


@functools.partial(nnx.jit, static_argnames="temperature")
def tree_scores(model: Qwen, tree: Tree, *, temperature: float = 1.0) -> tuple:
    scores = completion_logp(model, tree, temperature=temperature, chunk=2)
    return scores.logp_NPGC, scores.entropy_NPGC


@functools.partial(jax.jit, static_argnames=("config", "shape", "temperature"))
def oracle(
    params: dict,
    tokens: jax.Array,
    place: jax.Array,
    weight: jax.Array,
    *,
    config: ModelConfig,
    shape: tuple[int, ...],
    temperature: float,
) -> tuple:
    """Flat scores, and the gradient of Σ weight · (logp + 0.1 · entropy)."""

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        logits = flat_qwen.logits(params, config, tokens)
        scores = flat_qwen.gather_scores(
            logits, tokens, place, shape=shape, temperature=temperature
        )
        return jnp.sum(weight * (scores[0] + 0.1 * scores[1])), scores

    gradient, scores = jax.grad(loss, has_aux=True)(params)
    return scores, gradient


def flat(
    model: Qwen, tree: Tree, *, weight: np.ndarray | None = None, temperature: float = 1.0
) -> tuple:
    """The oracle's scores and gradient of a tree, in float64."""
    shape = tree.completion.tokens.shape
    with jax.enable_x64(True):
        found = oracle(
            flat_qwen.parameters(model),
            *flat_qwen.flat_rows(tree),
            np.ones(shape) if weight is None else weight,
            config=model.config,
            shape=shape,
            temperature=temperature,
        )
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(("tied", "trees"), [(False, 1), (False, 2), (True, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_scores(tied: bool, trees: int, seed: int) -> None:
    model, tree = make_model(tied=tied), make_tree(seed, trees=trees)
    logp, entropy = tree_scores(model, tree)
    assert logp.dtype == entropy.dtype == jnp.float32
    (expected_logp, expected_entropy), _ = flat(model, tree)
    np.testing.assert_allclose(logp, expected_logp, atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_of_other_families(family: str) -> None:
    model, tree = drawn_model(FAMILIES[family]), make_tree(8)
    weight = np.random.default_rng(8).normal(size=tree.completion.tokens.shape)
    (expected_logp, expected_entropy), expected = flat(model, tree, weight=weight)
    logp, entropy = tree_scores(model, tree)
    np.testing.assert_allclose(logp, expected_logp, atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5, rtol=0)
    _assert_gradients(tree_gradient(model, tree, weight.astype(np.float32)), expected)


def _assert_gradients(found: nnx.State, expected: dict[str, np.ndarray]) -> None:
    got = flat_qwen.by_name(found)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(
            got[name], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )


def test_scores_under_a_temperature() -> None:
    model, tree = make_model(tied=True), make_tree(3)
    logp, entropy = tree_scores(model, tree, temperature=0.7)
    (expected_logp, expected_entropy), _ = flat(model, tree, temperature=0.7)
    np.testing.assert_allclose(logp, expected_logp, atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5, rtol=0)


@nnx.jit
def tree_gradient(model: Qwen, tree: Tree, weight: jax.Array) -> nnx.State:
    def loss(model: Qwen) -> jax.Array:
        scores = completion_logp(model, tree, chunk=2)
        return jnp.sum(weight * (scores.logp_NPGC + 0.1 * scores.entropy_NPGC))

    return nnx.grad(loss)(model)


@pytest.mark.parametrize(("tied", "trees", "seed"), [(False, 1, 0), (False, 2, 1), (True, 2, 2)])
def test_gradients(tied: bool, trees: int, seed: int) -> None:
    """Cotangents of shared tokens add up: guide and questions get all their completions' share."""
    model, tree = make_model(tied=tied), make_tree(seed, trees=trees)
    weight = np.random.default_rng(seed).normal(size=tree.completion.tokens.shape)
    _, expected = flat(model, tree, weight=weight)
    _assert_gradients(tree_gradient(model, tree, weight.astype(np.float32)), expected)


@pytest.mark.parametrize("rubbish", ["ids", "outside the vocabulary"])
def test_what_stands_in_the_padding_changes_nothing(rubbish: str) -> None:
    model, tree = make_model(tied=False), make_tree(4)
    weight = np.ones(tree.completion.tokens.shape, np.float32)
    rng = np.random.default_rng(99)

    def spoiled(level: Level) -> Level:
        mask = np.asarray(length_mask(level.length, level.tokens.shape[-1]))
        other = rng.integers(0, VOCAB, level.tokens.shape)
        other = other if rubbish == "ids" else np.where(other % 2, -1, 10**6)
        return Level(np.where(mask, level.tokens, other).astype(np.int32), level.length)

    other = Tree(spoiled(tree.guide), spoiled(tree.question), spoiled(tree.completion))
    for got, expected in zip(tree_scores(model, other), tree_scores(model, tree), strict=True):
        np.testing.assert_array_equal(got, expected)
    gradients = tree_gradient(model, tree, weight), tree_gradient(model, other, weight)
    jax.tree.map(np.testing.assert_array_equal, *map(flat_qwen.by_name, gradients))


def test_wider_padding_changes_nothing() -> None:
    model, tree = make_model(tied=False), make_tree(5)
    wide = lambda level: Level(  # noqa: E731
        np.pad(level.tokens, [(0, 0)] * level.length.ndim + [(0, 3)], constant_values=7),
        level.length,
    )
    wider = Tree(wide(tree.guide), wide(tree.question), wide(tree.completion))
    for got, expected in zip(tree_scores(model, wider), tree_scores(model, tree), strict=True):
        np.testing.assert_allclose(got[..., :C], expected, atol=2e-6)
        np.testing.assert_array_equal(got[..., C:], 0)


def test_order_of_questions_and_completions_is_free() -> None:
    model, tree = make_model(tied=False), make_tree(6)
    p, g = [1, 0], [2, 0, 1]
    moved = Tree(
        tree.guide,
        Level(tree.question.tokens[:, p], tree.question.length[:, p]),
        Level(tree.completion.tokens[:, p][:, :, g], tree.completion.length[:, p][:, :, g]),
    )
    for got, whole in zip(tree_scores(model, moved), tree_scores(model, tree), strict=True):
        np.testing.assert_allclose(got, whole[:, p][:, :, g], atol=2e-6)


def unique_tree() -> Tree:
    """Two trees of two questions of two completions in which no token id occurs twice."""
    ids = iter(np.random.default_rng(7).permutation(VOCAB))

    def level(width: int, length: np.ndarray) -> Level:
        tokens = np.array([next(ids) for _ in range(length.size * width)], np.int32)
        return Level(tokens.reshape(*length.shape, width), length.astype(np.int32))

    return Tree(
        guide=level(3, np.array([3, 2])),
        question=level(2, np.array([[2, 1], [1, 2]])),
        completion=level(4, np.array([[[4, 3], [2, 4]], [[4, 0], [1, 4]]])),
    )


def test_causality_by_gradients() -> None:
    """A token's log-probability depends on its guide, its question and what precedes it: no more.

    Token ids are unique and the head is untied, so the gradient to a row of the embedding is the
    gradient to one token of the tree: not zero for every token that is seen, exactly zero for the
    token itself, later ones, siblings, other questions, the other tree and all padding.
    """
    model, tree = make_model(tied=False), unique_tree()
    graph, state = nnx.split(model)

    def logp(embed: jax.Array) -> jax.Array:
        fresh = nnx.merge(graph, state)
        fresh.embed = nnx.Param(embed)
        return completion_logp(fresh, tree).logp_NPGC

    jacobian_NPGCV = np.abs(jax.jit(jax.jacrev(logp))(model.embed[...])).max(-1)
    assert jacobian_NPGCV.shape == (*tree.completion.tokens.shape, VOCAB)
    for n, p, g, c in np.ndindex(tree.completion.tokens.shape):
        seen = set()
        if c < tree.completion.length[n, p, g]:
            seen |= set(tree.guide.tokens[n, : tree.guide.length[n]])
            seen |= set(tree.question.tokens[n, p, : tree.question.length[n, p]])
            seen |= set(tree.completion.tokens[n, p, g, :c])
        assert set(np.flatnonzero(jacobian_NPGCV[n, p, g, c])) == seen, (n, p, g, c)
