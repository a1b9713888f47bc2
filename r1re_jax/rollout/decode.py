"""The jitted programs of a rollout: prefill, the first token, and chunks of further tokens.

All take the parameters as an argument and everything else that shapes a program (graph, settings,
stop tokens, mesh) as a static one: a program is compiled once and serves every step of a run.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from r1re_jax import sharding
from r1re_jax.model.qwen import Cache, KeyValue
from r1re_jax.model.tree import Level
from r1re_jax.rollout.keys import token_keys
from r1re_jax.rollout.sampling import SamplingSettings, sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a decoding program is compiled for.

    Attributes:
        settings: how a token is drawn.
        stop_ids: tokens that end a completion.
        pad_id: written behind the end.
        limit: C, most tokens of a completion, the stop token included.
        mesh: where to compute; None: wherever the arguments are.
    """

    settings: SamplingSettings
    stop_ids: tuple[int, ...]
    pad_id: int
    limit: int
    mesh: Mesh | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Completions while they are drawn. B stands for [*, P, G]; all rows are at the same token.

    Attributes:
        step: int32 scalar, tokens drawn of every row that is not done.
        tokens: [*B, C] int32, the tokens drawn; the pad id from `length` on.
        logp: [*B, C] fp32, their log-probabilities; 0 from `length` on.
        length: [*B] int32, tokens of the completion, its stop token included.
        done: [*B] bool: the sampler drew a stop token, or the row is no completion at all.
        own: keys and values [L, *B, C, K, A] of the completions' tokens but the last drawn.
    """

    step: jax.Array
    tokens: jax.Array
    logp: jax.Array
    length: jax.Array
    done: jax.Array
    own: KeyValue


@functools.partial(jax.jit, static_argnames=("graph", "mesh"))
def prefill(
    graph: nnx.GraphDef,
    params: nnx.State,
    levels: Sequence[Level],
    *,
    ancestors: Sequence[Cache] = (),
    mesh: Mesh | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Compute levels of the tree, each below those before it and the ancestors.

    Args:
        graph: of `nnx.split(model)`; static.
        params: of `nnx.split(model)`.
        levels: from the top down; batch dimensions of each are a prefix of the next one's.
        ancestors: levels above that are computed already.
        mesh: spreads the last batch axis of the last level (the questions), where it has one, over
            the data axes.

    Returns:
        hidden [*B, D] of the last true token of each row of the last level (meaningless for a row
        without tokens), and the caches of ancestors and levels.
    """
    model = nnx.merge(graph, params)
    caches = tuple(ancestors)
    for level in levels:
        length, tokens = jnp.asarray(level.length), jnp.asarray(level.tokens)
        questions = length.ndim - 1
        if level is levels[-1] and questions >= 0:
            length, tokens = (_spread(x, mesh, questions) for x in (length, tokens))
        # Padding may hold any id; one outside the vocabulary would embed as NaN.
        slots = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
        tokens = jnp.where(slots < length[..., None], tokens, 0)
        hidden, own = model.extend(tokens, start=end_of(caches, length.shape), ancestors=caches)
        caches = (*caches, Cache(own.key, own.value, length))
    last = jnp.maximum(length - 1, 0)[..., None, None]
    return jnp.take_along_axis(hidden, last, axis=-2)[..., 0, :], caches


def end_of(ancestors: Sequence[Cache], shape: Sequence[int]) -> jax.Array:
    """Return [*shape] int32, the position behind the true tokens of all ancestors."""
    total = jnp.zeros(shape, jnp.int32)
    for cache in ancestors:
        below = len(shape) - cache.length.ndim
        total += cache.length.reshape(*cache.length.shape, *[1] * below)
    return total


@functools.partial(jax.jit, static_argnames=("graph", "program"))
def start_state(
    graph: nnx.GraphDef,
    params: nnx.State,
    hidden: jax.Array,
    ancestors: Sequence[Cache],
    keys: jax.Array,
    *,
    program: Program,
) -> DecodeState:
    """Draw the first token of every completion.

    Args:
        graph: of `nnx.split(model)`; static.
        params: of `nnx.split(model)`.
        hidden: [*, P, D] that predicts the first token.
        ancestors: the questions' cache last. What is below a question of length 0 is done at once.
        keys: typed row keys [*, P, G].
        program: static.
    """
    model = nnx.merge(graph, params)
    batch, questions = keys.shape, keys.ndim - 2
    logits = model.logits(hidden)[..., None, :]
    blank = DecodeState(
        step=jnp.int32(0),
        tokens=jnp.full((*batch, program.limit), program.pad_id, jnp.int32),
        logp=jnp.zeros((*batch, program.limit), jnp.float32),
        length=jnp.zeros(batch, jnp.int32),
        done=jnp.broadcast_to(ancestors[-1].length[..., None] == 0, batch),
        own=jax.tree.map(
            lambda x: _spread(x, program.mesh, 1 + questions, kv_heads=True),
            model.empty_cache(batch, program.limit),
        ),
    )
    return _draw(blank, jnp.broadcast_to(logits, (*batch, logits.shape[-1])), keys, program)


@functools.partial(jax.jit, static_argnames=("graph", "program"), donate_argnames="state")
def decode_chunk(
    graph: nnx.GraphDef,
    params: nnx.State,
    state: DecodeState,
    ancestors: Sequence[Cache],
    keys: jax.Array,
    chunk: jax.Array,
    *,
    program: Program,
) -> tuple[DecodeState, jax.Array]:
    """Draw up to `chunk` further tokens of every row; end early when all rows are done.

    Args:
        graph: of `nnx.split(model)`; static.
        params: of `nnx.split(model)`.
        state: donated: its buffers become the result's.
        ancestors: caches above the completions.
        keys: typed row keys [*B].
        chunk: int32 scalar.
        program: static.

    Returns:
        The state, and int32 [2]: the tokens drawn so far, and the number of rows that are done.
    """
    # Cast before the loop and not at every token. `decode` would cast each use to the same type.
    model = nnx.merge(graph, params)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(model.dtype), params))
    start = end_of(ancestors, keys.shape)
    until = jnp.minimum(state.step + chunk, program.limit)

    def advance(state: DecodeState) -> DecodeState:
        before = state.step - 1
        last = jax.lax.dynamic_index_in_dim(state.tokens, before, axis=-1, keepdims=False)
        hidden, own = model.decode(
            last, step=before, start=start, ancestors=ancestors, own=state.own
        )
        return _draw(dataclasses.replace(state, own=own), model.logits(hidden), keys, program)

    state = jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done), advance, state)
    return state, jnp.stack([state.step, jnp.sum(state.done, dtype=jnp.int32)])


def _draw(
    state: DecodeState, logits_BV: jax.Array, keys: jax.Array, program: Program
) -> DecodeState:
    """Draw token number `state.step` of every row; done rows get the pad id, log-prob 0."""
    drawn, logp = sample(logits_BV, token_keys(keys, state.step), program.settings)
    stop = functools.reduce(jnp.logical_or, [drawn == stop for stop in program.stop_ids])
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.step, axis=-1)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        tokens=put(state.tokens, jnp.where(state.done, program.pad_id, drawn)),
        logp=put(state.logp, jnp.where(state.done, 0.0, logp)),
        length=state.length + ~state.done,
        done=state.done | stop,
    )


def _spread(x: jax.Array, mesh: Mesh | None, axis: int, *, kv_heads: bool = False) -> jax.Array:
    """Shard the questions' axis, and the last but one as key-value heads where it is that."""
    if mesh is None:
        return x
    names: list[str | None] = [None] * x.ndim
    names[axis] = "question"
    if kv_heads:
        names[-2] = "kv_heads"
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.spec(tuple(names))))
