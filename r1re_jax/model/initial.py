"""A start for small policies trained from nothing: attention that already looks things up.

Quoting from the prompt takes two heads in a row (Olsson et al., arXiv 2209.11895): one that brings
each token the one before it, and one that looks for the token whose predecessor equals the current
one and says it. From random weights this pair forms late, and all that a guide's reader has to
learn waits for it: measured in docs/decisions.md. As in mimetic initialization (Trockman and
Kolter, arXiv 2305.09828) the pair is put in place before training, which may change it as it likes.
"""

import enum

import jax.numpy as jnp
import numpy as np

from r1re_jax.model.qwen import Qwen


class Initial(enum.StrEnum):
    """How random weights are drawn."""

    NORMAL = "normal"  # every matrix from a normal distribution
    QUOTING = "quoting"  # and two heads wired to quote from the prompt


# Gains, chosen so that at the start a match outweighs chance overlaps and position outweighs content.
_POSITION_GAIN = 6.3
_MATCH_GAIN = 1.7
_PREDECESSOR_GAIN = 0.25
_COPY_GAIN = 0.3
_RESIDUAL_SCALE = 0.1
# Rotary pairs: the fastest tell neighbours apart, the slow ones hardly turn over a whole prompt.
_FAST_PAIRS = 3
_SLOW_FROM = 0.45


def wire_quoting(model: Qwen, *, seed: int = 0) -> None:
    """Rewire the first two layers of a randomly drawn model in place.

    Layer 0, head 0 attends to the token before: with zero weights, biases k = (s, 0) and
    q = s·(cos θ_f, −sin θ_f) in the fast rotary pairs f give the score s² Σ_f cos(θ_f (i − j − 1)), whose
    peak is j = i − 1. It writes U·x of that token along B; the next head of the same group does so for
    the token before that. In layer 1 the first head of each
    key-value head has queries U·x and keys Bᵀ·x in the slow pairs, so that a token attends to where
    it stood before, one place further on, and adds what it finds there to its own prediction.

    Args:
        model: at least two layers and a tied head, whose rows the copied tokens are read by.
        seed: of the random projections.

    Raises:
        ValueError: a model of one layer, with a head of its own, or too small a head.
    """
    config = model.config
    half, width, size = config.head_size // 2, config.width, config.head_size
    slow = np.arange(int(_SLOW_FROM * half), half)
    if config.layers < 2 or not config.tied or half <= _FAST_PAIRS or 2 * len(slow) > width:
        raise ValueError(
            "wiring needs two layers, a tied head, head_size above"
            f" {2 * _FAST_PAIRS} and no wider than the model; found {config}"
        )
    slow = np.concatenate([slow, slow + half])
    rng = np.random.default_rng(seed)
    content, predecessor, second = (_orthonormal(rng, width, len(slow)) for _ in range(3))
    blocks = model.layers
    linears = (blocks.query, blocks.key, blocks.value, blocks.output, blocks.down)
    query, key, value, output, down = (np.array(linear.weight[...]) for linear in linears)
    query_bias, key_bias = np.array(blocks.query.bias[...]), np.array(blocks.key.bias[...])
    # A token must still be recognisable behind layer 0: its branches start small.
    output *= _RESIDUAL_SCALE
    down *= _RESIDUAL_SCALE

    angle = config.rope_theta ** (-np.arange(_FAST_PAIRS) / half)
    group = config.query_heads // config.kv_heads
    key[0, :, :size] = value[0, :, :size] = 0
    key_bias[0, :_FAST_PAIRS] = _POSITION_GAIN
    value[0][:, slow] = content
    for back, written in enumerate((predecessor, second)[:group], start=1):
        mine = (back - 1) * size
        query[0, :, mine : mine + size] = output[0, mine : mine + size] = 0
        query_bias[0, mine : mine + _FAST_PAIRS] = _POSITION_GAIN * np.cos(back * angle)
        high = mine + half
        query_bias[0, high : high + _FAST_PAIRS] = -_POSITION_GAIN * np.sin(back * angle)
        output[0, mine + slow] = _PREDECESSOR_GAIN * written.T

    for kv_head in range(config.kv_heads):
        mine, theirs = kv_head * group * size, kv_head * size
        copied = _orthonormal(rng, width, size)
        query[1, :, mine : mine + size] = 0
        query[1][:, mine + slow] = _MATCH_GAIN * content
        key[1, :, theirs : theirs + size] = 0
        key[1][:, theirs + slow] = _MATCH_GAIN * predecessor
        value[1, :, theirs : theirs + size] = copied
        output[1, mine : mine + size] = _COPY_GAIN * copied.T

    for linear, weight in zip(linears, (query, key, value, output, down), strict=True):
        linear.weight[...] = jnp.asarray(weight)
    blocks.query.bias[...] = jnp.asarray(query_bias)
    blocks.key.bias[...] = jnp.asarray(key_bias)


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draw a [rows, columns] matrix of orthonormal columns."""
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0].astype(np.float32)
