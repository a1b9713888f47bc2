"""Log-probabilities of completions, computed over the tree: every distinct token once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from r1re_jax.model.qwen import Cache, Qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rl.masks import length_mask


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
        chunk: completion positions (of every row) whose logits exist at a time. Their whole,
            [N, P, G, C, V], never exists, in the backward pass neither.

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
    guide_length = jnp.asarray(tree.guide.length)
    question_length = jnp.asarray(tree.question.length)
    _, guide = model.extend(_tokens(tree.guide), start=jnp.zeros_like(guide_length))
    above = (Cache(guide.key, guide.value, guide_length),)
    start_NP = jnp.broadcast_to(guide_length[:, None], question_length.shape)
    question_NPQD, question = model.extend(_tokens(tree.question), start=start_NP, ancestors=above)
    above = (*above, Cache(question.key, question.value, question_length))
    start_NPG = jnp.broadcast_to(
        (start_NP + question_length)[..., None], tree.completion.length.shape
    )
    hidden_NPGCD, _ = model.extend(_tokens(tree.completion), start=start_NPG, ancestors=above)

    last_NP = question_length[..., None, None] - 1
    first_NPD = jnp.take_along_axis(question_NPQD, last_NP, axis=-2, mode="clip")
    first_NPGD = jnp.broadcast_to(first_NPD[:, :, None], hidden_NPGCD[..., :1, :].shape)
    return jnp.concatenate([first_NPGD, hidden_NPGCD[..., :-1, :]], axis=-2)


def _tokens(level: Level) -> jax.Array:
    """Return the tokens with id 0 in the padding: an id outside the vocabulary embeds as NaN."""
    tokens = jnp.asarray(level.tokens)
    return jnp.where(length_mask(level.length, tokens.shape[-1]), tokens, 0)


def _score_in_chunks(
    model: Qwen, hidden_BCD: jax.Array, token_BC: jax.Array, *, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return log-probability and entropy [*B, C], scanning over chunks of C.

    The scan runs over positions and not over flattened rows: rows are what a mesh shards.
    """
    limit = token_BC.shape[-1]
    chunk = min(chunk, max(limit, 1))
    pieces = -(-limit // chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple]:
        hidden, token = inputs
        logp_BcV = jax.nn.log_softmax(model.logits(hidden) / temperature, axis=-1)
        # A sum under a comparison, not a gather: the vocabulary axis may be sharded.
        chosen = jax.lax.broadcasted_iota(jnp.int32, logp_BcV.shape, token.ndim) == token[..., None]
        logp = jnp.sum(jnp.where(chosen, logp_BcV, 0.0), axis=-1)
        return None, (logp, -jnp.sum(jnp.exp(logp_BcV) * logp_BcV, axis=-1))

    xs = (_cut(hidden_BCD, -2, pieces, chunk), _cut(token_BC, -1, pieces, chunk))
    _, scores = jax.lax.scan(piece, None, xs)
    logp, entropy = (_join(x_pBc)[..., :limit] for x_pBc in scores)
    return logp, entropy


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
