"""Log-probabilities of completions, computed over the tree: every distinct token once."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Tree
from r1re_jax.rl.masks import length_mask
from r1re_jax.sharding import shares_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What the policy thinks of the completions' tokens; 0 in the padding.

    Attributes:
        logp_NPGC: fp32 log-probability of each token, given all before it.
        entropy_NPGC: fp32 entropy, in nats, of the distribution that each token was drawn from.
    """

    logp_NPGC: jax.Array
    entropy_NPGC: jax.Array


def completion_logp(
    model: Qwen, tree: Tree, *, temperature: float = 1.0, chunk: int = 128
) -> Scores:
    """Score every completion of a tree; differentiable with respect to the model.

    Equal, to rounding, to scoring each row guide + question + completion alone; so is the gradient,
    since the cotangents of shared tokens add up.

    Args:
        model: the policy or the reference.
        tree: token ids and true lengths; padding may hold any id. A question has a token
            at least.
        temperature: logits are divided by it: score under the distribution that was sampled from.
        chunk: completion positions (of every row) whose logits exist at a time, one of each device
            at least where devices share positions. Their whole, [N, P, G, C, V], never exists, in
            the backward pass neither.

    Returns:
        Scores in fp32.

    Raises:
        ValueError: a temperature of 0 or below (greedy decoding has no distribution), chunk < 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 position")
    mask = length_mask(tree.completion.length, tree.completion.tokens.shape[-1])
    logp, entropy = _score_in_chunks(
        model,
        predicting_hidden(model, tree),
        jnp.asarray(tree.completion.tokens),
        temperature=temperature,
        chunk=chunk,
    )
    return Scores(jnp.where(mask, logp, 0.0), jnp.where(mask, entropy, 0.0))


def predicting_hidden(model: Qwen, tree: Tree) -> jax.Array:
    """Return [N, P, G, C, D]: for each completion token the hidden state that predicts it.

    Token 0 is predicted by the last true token of its question, token c by completion token c − 1.
    """
    levels = tree.guide, tree.question, tree.completion
    (_, question_NPQD, hidden_NPGCD), _ = model.extend_levels(levels)

    last_NP = jnp.asarray(tree.question.length)[..., None, None] - 1
    first_NPD = jnp.take_along_axis(question_NPQD, last_NP, axis=-2, mode="clip")
    first_NPGD = jnp.broadcast_to(first_NPD[:, :, None], hidden_NPGCD[..., :1, :].shape)
    return jnp.concatenate([first_NPGD, hidden_NPGCD[..., :-1, :]], axis=-2)


def _score_in_chunks(
    model: Qwen, hidden_BCD: jax.Array, token_BC: jax.Array, *, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return log-probability and entropy [*B, C], scanning over chunks of C.

    The scan runs over positions and not over flattened rows: rows are what a mesh shards.
    """
    weight, questions, shape = model.head_weight(), token_BC.ndim - 3, token_BC.shape
    # Of positions that devices share, a chunk has some of each device's.
    ways = model.mesh.shape["sequence"] if shares_positions(model.mesh, shape[-1]) else 1
    token_BC = token_BC.reshape(*shape[:-1], ways, -1)
    hidden_BCD = hidden_BCD.reshape(*token_BC.shape, hidden_BCD.shape[-1])
    limit = token_BC.shape[-1]
    chunk = min(max(chunk // ways, 1), max(limit, 1))
    pieces = -(-limit // chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple]:
        hidden, token = inputs
        logits = model.logits(hidden, questions=questions, weight=weight)
        return None, token_scores(logits / temperature, token)

    xs = (_cut(hidden_BCD, -2, pieces, chunk), _cut(token_BC, -1, pieces, chunk))
    _, scores = jax.lax.scan(piece, None, xs)
    logp, entropy = (_join(x_pBc)[..., :limit].reshape(shape) for x_pBc in scores)
    return logp, entropy


@jax.custom_vjp
def token_scores(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log-probability of each token, and entropy of its distribution, [*B] fp32 both.

    With p = softmax(logits) and H = −Σ p log p: ∂ log p_t / ∂ logit_i = [i = t] − p_i and
    ∂H / ∂ logit_i = −p_i (log p_i + H).
    """
    return _score_tokens(logits_BV, token_B)[0]


def _score_tokens(logits_BV: jax.Array, token_B: jax.Array) -> tuple[tuple, tuple]:
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    weight_BV = jnp.exp(shifted_BV)
    # A sum under a comparison, not a gather: the vocabulary axis may be sharded.
    chosen_BV = jnp.where(_is_token(token_B, shifted_BV.shape), shifted_BV, 0.0)
    total, drift, chosen = _sums(weight_BV, weight_BV * shifted_BV, chosen_BV)
    log_total = jnp.log(total)
    entropy = log_total - drift / total
    return (chosen - log_total, entropy), (shifted_BV, log_total, entropy, token_B)


def _sums(*arrays_BV: jax.Array) -> tuple[jax.Array, ...]:
    """Sum each over the last axis, in one pass for all of them.

    In two stages: XLA's CPU compiler adds up several sums at once one number after the other, so
    that of 49,152 fp32 numbers a sum is off by 1e-4 of itself, and a log-probability by that much.
    A power of two of parts, since the vocabulary may be shared by as many devices: an odd one has
    a single part.
    """
    *rows, vocab = arrays_BV[0].shape
    parts = math.gcd(vocab, 64)
    add = lambda one, other: tuple(map(jnp.add, one, other))  # noqa: E731
    within = jax.lax.reduce(
        tuple(x.reshape(*rows, parts, vocab // parts) for x in arrays_BV),
        (np.float32(0),) * len(arrays_BV),
        add,
        (len(rows) + 1,),
    )
    return tuple(jnp.sum(x, axis=-1) for x in within)


def _score_tokens_backward(kept: tuple, cotangents: tuple) -> tuple[jax.Array, None]:
    shifted_BV, log_total, entropy, token_B = kept
    by_logp, by_entropy = (x[..., None] for x in cotangents)
    logp_BV = shifted_BV - log_total[..., None]
    slope_BV = by_logp + by_entropy * (logp_BV + entropy[..., None])
    is_token = _is_token(token_B, shifted_BV.shape)
    return jnp.where(is_token, by_logp, 0.0) - jnp.exp(logp_BV) * slope_BV, None


token_scores.defvjp(_score_tokens, _score_tokens_backward)


def _is_token(token_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == token_B[..., None]


def _cut(x: jax.Array, axis: int, pieces: int, chunk: int) -> jax.Array:
    """Pad `axis` to pieces · chunk and move the pieces to the front."""
    axis += x.ndim
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, pieces * chunk - x.shape[axis])
    shape = (*x.shape[:axis], pieces, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)


def _join(x_pBc: jax.Array) -> jax.Array:
    """[pieces, *B, chunk] -> [*B, pieces · chunk]."""
    x_Bpc = jnp.moveaxis(x_pBc, 0, -2)
    return x_Bpc.reshape(*x_Bpc.shape[:-2], -1)
