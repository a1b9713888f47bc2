"""Qwen2 on flat rows, written apart from the package: the oracle for everything the tree computes.

Each completion is laid out as one row guide + question + completion without padding in between,
and goes through a textbook decoder with one full attention matrix: keys repeated to the query
heads, one softmax, a loop over the layers, the whole [rows, T, V] logits. Nothing is cached, shared
or chunked.
Only the *names* of the parameters are taken from `r1re_jax.model.qwen`.

Run it in float64, so that what differs is the error of what is tested:

    with jax.enable_x64(True):
        logp_NPGC, entropy_NPGC = flat_scores(parameters(model), model.config, tree)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, Any]


def parameters(model: nnx.Module) -> Params:
    """Return all parameters as NumPy float64 by dotted path; those of layers are stacked [L, …]."""
    return by_name(nnx.state(model, nnx.Param))


def by_name(state: nnx.State) -> Params:
    """Return a state (of parameters or of their gradients) as NumPy float64 by dotted path."""
    flat = nnx.to_flat_state(state)
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value(), np.float64) for path, leaf in flat
    }


@jax.numpy_rank_promotion("allow")
def logits(params: Params, config: Any, tokens_BT: Any) -> jax.Array:
    """Return the logits [B, T, V] of rows of token ids; positions count from 0 in every row.

    Rows may be padded on the right: attention is causal.
    """
    length = tokens_BT.shape[-1]
    causal = np.tril(np.ones((length, length), bool))
    x = jnp.asarray(params["embed"])[tokens_BT]
    for layer in range(config.layers):
        weights = {
            name.removeprefix("layers."): jnp.asarray(value)[layer]
            for name, value in params.items()
            if name.startswith("layers.")
        }
        x = x + _attention(
            weights, config, _rms(x, weights["attention_norm.weight"], config), causal
        )
        h = _rms(x, weights["mlp_norm.weight"], config)
        gate = h @ weights["gate.weight"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (h @ weights["up.weight"])) @ weights["down.weight"]
    head = params["embed"].T if config.tied else params["head"]
    return _rms(x, params["norm.weight"], config) @ head


def _rms(x: jax.Array, weight: jax.Array, config: Any) -> jax.Array:
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight


def _attention(weights: Params, config: Any, h: jax.Array, causal: np.ndarray) -> jax.Array:
    def heads(name: str) -> jax.Array:
        y = h @ weights[f"{name}.weight"]
        if config.family == "qwen2":
            y = y + weights[f"{name}.bias"]
        y = y.reshape(*y.shape[:2], -1, config.head_size)
        if config.family == "qwen3" and name != "value":
            y = _rms(y, weights[f"{name}_norm.weight"], config)
        return y

    groups = config.query_heads // config.kv_heads
    query = _rotate(heads("query"), config)
    key = jnp.repeat(_rotate(heads("key"), config), groups, axis=2)
    value = jnp.repeat(heads("value"), groups, axis=2)
    score = jnp.einsum("bthd,bshd->bhts", query, key) / np.sqrt(config.head_size)
    weight = jax.nn.softmax(jnp.where(causal, score, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weight, value)
    return out.reshape(*out.shape[:2], -1) @ weights["output.weight"]


def _rotate(x: jax.Array, config: Any) -> jax.Array:
    """Rotary embedding by complex numbers: x_i + j·x_{i+A/2} is turned by the angle t·θ_i."""
    half = x.shape[-1] // 2
    frequency = config.rope_theta ** (-2 * np.arange(half) / x.shape[-1])
    if (scaling := config.rope_scaling) is not None:
        frequency = np.array([_scaled(one, scaling) for one in frequency])
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * frequency)[None, :, None]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return jnp.concatenate([turned.real, turned.imag], -1)


def flat_rows(tree: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lay a tree out as rows guide + question + completion of true tokens only.

    Returns:
        tokens [N·P·G, S + Q + C] int, 0 behind each row's end, and [N·P·G, 2]: where in its row the
        completion begins and ends.
    """
    guide, question, completion = (
        (np.asarray(level.tokens), np.asarray(level.length))
        for level in (tree.guide, tree.question, tree.completion)
    )
    limit = guide[0].shape[-1] + question[0].shape[-1] + completion[0].shape[-1]
    rows, places = [], []
    for n, p, g in np.ndindex(completion[1].shape):
        prompt = [*guide[0][n, : guide[1][n]], *question[0][n, p, : question[1][n, p]]]
        row = [*prompt, *completion[0][n, p, g, : completion[1][n, p, g]]]
        rows.append(row + [0] * (limit - len(row)))
        places.append((len(prompt), len(row)))
    return np.array(rows), np.array(places)


def flat_scores(
    params: Params, config: Any, tree: Any, *, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every completion token [N, P, G, C], 0 in the padding.

    Token i of a row is predicted by the logits at i − 1. Differentiable with respect to `params`.
    """
    tokens_BT, place_B2 = flat_rows(tree)
    return gather_scores(
        logits(params, config, tokens_BT),
        tokens_BT,
        place_B2,
        shape=np.shape(tree.completion.tokens),
        temperature=temperature,
    )


@jax.numpy_rank_promotion("allow")
def gather_scores(
    logits_BTV: jax.Array,
    tokens_BT: Any,
    place_B2: Any,
    *,
    shape: tuple[int, ...],
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Cut the completions' scores out of the rows' logits, laid out as `shape` [N, P, G, C]."""
    logp_BTV = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
    index_BC = place_B2[:, :1] + jnp.arange(shape[-1])
    mask_BC = index_BC < place_B2[:, 1:]
    index_BC = jnp.where(mask_BC, index_BC, 1)
    row_B1 = jnp.arange(len(tokens_BT))[:, None]
    predicted_BCV = logp_BTV[row_B1, index_BC - 1]
    token_BC = jnp.asarray(tokens_BT)[row_B1, index_BC]
    logp_BC = jnp.take_along_axis(predicted_BCV, token_BC[..., None], axis=-1)[..., 0]
    entropy_BC = -(jnp.exp(predicted_BCV) * predicted_BCV).sum(-1)
    keep = lambda x_BC: jnp.where(mask_BC, x_BC, 0.0).reshape(shape)  # noqa: E731
    return keep(logp_BC), keep(entropy_BC)


def _scaled(frequency: float, scaling: Any) -> float:
    """Llama 3.1's frequency by its wavelength, case by case."""
    wavelength = 2 * np.pi / frequency
    old = scaling.original_context
    if wavelength < old / scaling.high_freq_factor:
        return frequency
    if wavelength > old / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (old / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
