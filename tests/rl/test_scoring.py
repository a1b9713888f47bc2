"""Scoring over the tree: what is not already proven against the flat oracle in tests/invariants."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.scoring import completion_logp, predicting_hidden, token_scores

N, P, G, C, V = 2, 2, 2, 5, 97
CONFIG = ModelConfig(
    vocab=V, layers=2, width=16, query_heads=2, kv_heads=1, head_size=8, mlp_width=24
)


@functools.cache
def model(dtype: str = "float32") -> Qwen:
    return Qwen(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.dtype(dtype))


@functools.cache
def tree() -> Tree:
    rng = np.random.default_rng(0)

    def level(least: int, *shape: int) -> Level:
        length = rng.integers(least, shape[-1] + 1, shape[:-1])
        return Level(rng.integers(0, V, shape), length)

    made = Tree(level(2, N, 4), level(1, N, P, 3), level(0, N, P, G, C))
    made.completion.length[0, 0] = [0, C]
    return made


def test_padding_scores_zero() -> None:
    scores = completion_logp(model(), tree())
    mask = np.asarray(length_mask(tree().completion.length, C))
    for x in (np.asarray(scores.logp_NPGC), np.asarray(scores.entropy_NPGC)):
        assert x.shape == (N, P, G, C)
        assert (x[~mask] == 0).all()
    assert (np.asarray(scores.logp_NPGC)[mask] < 0).all()
    assert (np.asarray(scores.entropy_NPGC)[mask] > 0).all()
    assert (np.asarray(scores.entropy_NPGC) <= np.log(V) + 1e-5).all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 128])
def test_chunks_of_any_size_give_the_same(chunk: int) -> None:
    """5 positions in chunks of 2 or 3 leave a rest, of 128 none is whole."""
    weight = np.random.default_rng(1).normal(size=(N, P, G, C))

    def loss(model: Qwen, chunk: int) -> jax.Array:
        scores = completion_logp(model, tree(), chunk=chunk)
        return jnp.sum(weight * (scores.logp_NPGC + scores.entropy_NPGC))

    run = nnx.jit(nnx.value_and_grad(loss), static_argnums=1)
    got, expected = run(model(), chunk), run(model(), C)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got[1], expected[1]
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    scores = completion_logp(model(), tree(), temperature=temperature)
    hidden = predicting_hidden(model(), tree())
    logits = np.asarray(model().logits(hidden), np.float64) / temperature
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(probability, tree().completion.tokens[..., None], -1)[..., 0]
    mask = np.asarray(length_mask(tree().completion.length, C))
    np.testing.assert_allclose(scores.logp_NPGC, np.where(mask, np.log(chosen), 0), atol=1e-5)
    entropy = -(probability * np.log(probability)).sum(-1)
    np.testing.assert_allclose(scores.entropy_NPGC, np.where(mask, entropy, 0), atol=1e-5)


def test_scores_are_fp32_whatever_the_model_computes_in() -> None:
    low, full = completion_logp(model("bfloat16"), tree()), completion_logp(model(), tree())
    for got, expected in zip(jax.tree.leaves(low), jax.tree.leaves(full), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=0.1)
        assert not np.array_equal(got, expected)


def test_the_whole_logits_never_exist() -> None:
    """No array of the lowered update, forward or backward, holds more logits than one chunk's."""
    graph, state = nnx.split(model())

    def loss(state: nnx.State) -> jax.Array:
        return jnp.sum(completion_logp(nnx.merge(graph, state), tree(), chunk=2).logp_NPGC)

    text = jax.jit(jax.grad(loss)).lower(state).as_text()
    shapes = {
        tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<([\dx]+x)f32>", text)
    }
    with_vocabulary = [shape for shape in shapes if shape and shape[-1] == V]
    assert (N, P, G, 1, 2, V) in with_vocabulary
    assert max(map(np.prod, with_vocabulary)) == max(N * P * G * 2, CONFIG.width) * V


def test_bad_arguments_are_refused() -> None:
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            completion_logp(model(), tree(), temperature=temperature)
    with pytest.raises(ValueError, match="chunk is 0"):
        completion_logp(model(), tree(), chunk=0)


@pytest.mark.parametrize("vocab", [2048, 49_152, 151_936])
def test_a_large_vocabulary_costs_no_digits(vocab: int) -> None:
    rows = 8
    logits = (3 * np.random.default_rng(0).normal(size=(rows, vocab))).astype(np.float32)
    tokens = np.arange(rows) * 7
    logp, entropy = jax.jit(token_scores)(logits, tokens)
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(-1))
    expected = shifted[np.arange(rows), tokens] - log_total
    np.testing.assert_allclose(logp, expected, atol=1e-5)
    drift = (np.exp(shifted) * shifted).sum(-1) / np.exp(log_total)
    np.testing.assert_allclose(entropy, log_total - drift, atol=1e-5)
