"""The jitted programs of a rollout: prefill, the first token, and chunks of further tokens.

All take the parameters as an argument and everything else that shapes a program (graph, settings,
stop tokens, mesh) as a static one: a program is compiled once and serves every step of a run.

Between chunks the batch may change its shape: finished rows are dropped (`compact`), and the cache
of what rows have written grows (`grown`). Which shapes there can be is known beforehand, see
`r1re_jax.rollout.shapes`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from r1re_jax import sharding
from r1re_jax.model.qwen import Cache, KeyValue, Qwen, by_layer
from r1re_jax.model.tree import Level
from r1re_jax.rollout.keys import token_keys
from r1re_jax.rollout.sampling import SamplingSettings, sample
from r1re_jax.rollout.shapes import RECENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a decoding program is compiled for.

    Attributes:
        settings: how a token is drawn.
        stop_ids: tokens that end a completion.
        pad_id: written behind the end.
        limit: C, most tokens of a completion, the stop token included.
        chunk: tokens that are drawn at a time.
        mesh: where to compute; None: wherever the arguments are.
    """

    settings: SamplingSettings
    stop_ids: tuple[int, ...]
    pad_id: int
    limit: int
    chunk: int
    mesh: Mesh | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What has been drawn, for all completions of the rollout, P·G and a spare one a tree.

    Attributes:
        tokens: [*, P·G + 1, C] int32; the pad id from `length` on.
        logp: of the same shape, fp32, their log-probabilities; 0 from `length` on.
        length: [*, P·G + 1] int32, tokens of the completion, its stop token included.
        done: [*, P·G + 1] bool: the sampler drew a stop token, or it is no completion at all.
    """

    tokens: jax.Array
    logp: jax.Array
    length: jax.Array
    done: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Completions while they are drawn. B stands for [*, P, G]; all rows are at the same token.

    Once finished rows have been dropped, P counts rows and G is 1.

    Attributes:
        step: int32 scalar, tokens drawn of every row that is not done.
        last: [*B] int32, the last token drawn.
        done: [*B] bool, as of `Drawn`, and of slots that hold no row.
        row: [*B] int32, which of `drawn` a slot draws; the spare one where it holds none.
        key: typed row keys [*B].
        past: keys and values, L arrays [K, *B, W, A], of whole blocks of RECENT tokens: XLA copies
            an array that it both reads and writes at a token.
        recent: keys and values, L arrays [K, *B, RECENT, A], of the block that is begun.
        drawn: see `Drawn`.
    """

    step: jax.Array
    last: jax.Array
    done: jax.Array
    row: jax.Array
    key: jax.Array
    past: KeyValue
    recent: KeyValue
    drawn: Drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """What changes at every token of a chunk.

    Attributes:
        step: as of `DecodeState`.
        last: as of `DecodeState`.
        done: as of `DecodeState`.
        count: [*B] int32, tokens of the chunk that belong to completions.
        tokens: [*B, chunk] int32, the chunk's tokens.
        logp: [*B, chunk] fp32, their log-probabilities.
        recent: as of `DecodeState`.
    """

    step: jax.Array
    last: jax.Array
    done: jax.Array
    count: jax.Array
    tokens: jax.Array
    logp: jax.Array
    recent: KeyValue


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


@functools.partial(jax.jit, static_argnames=("graph", "width", "program"))
def start_state(
    graph: nnx.GraphDef,
    params: nnx.State,
    hidden: jax.Array,
    ancestors: Sequence[Cache],
    keys: jax.Array,
    *,
    width: int,
    program: Program,
) -> DecodeState:
    """Draw the first token of every completion.

    Args:
        graph: of `nnx.split(model)`; static.
        params: of `nnx.split(model)`.
        hidden: [*, P, D] that predicts the first token.
        ancestors: the questions' cache last. What is below a question of length 0 is done at once.
        keys: typed row keys [*, P, G].
        width: W of the cache; static.
        program: static.
    """
    model, batch = nnx.merge(graph, params), keys.shape
    *trees, questions, group = batch
    logits = model.logits(hidden)[..., None, :]
    done = jnp.broadcast_to(ancestors[-1].length[..., None] == 0, batch)
    logits = jnp.broadcast_to(logits, (*batch, logits.shape[-1]))
    token, logp, ended = _draw(logits, keys, jnp.int32(0), done, program)
    row = jnp.arange(questions * group, dtype=jnp.int32).reshape(questions, group)
    rows = *trees, questions * group + 1
    blank = Drawn(
        tokens=jnp.full((*rows, program.limit), program.pad_id, jnp.int32),
        logp=jnp.zeros((*rows, program.limit), jnp.float32),
        length=jnp.zeros(rows, jnp.int32),
        done=jnp.ones(rows, bool),
    )
    state = DecodeState(
        step=jnp.int32(0),
        last=token,
        done=ended,
        row=jnp.broadcast_to(row, batch),
        key=keys,
        past=_empty(model, batch, width, program.mesh),
        recent=_empty(model, batch, RECENT, program.mesh),
        drawn=blank,
    )
    drawn = _recorded(state, token[..., None], logp[..., None], (~done).astype(jnp.int32))
    return dataclasses.replace(state, step=jnp.int32(1), drawn=drawn)


@functools.partial(jax.jit, static_argnames=("graph", "program"), donate_argnames="state")
def decode_chunk(
    graph: nnx.GraphDef,
    params: nnx.State,
    state: DecodeState,
    ancestors: Sequence[Cache],
    *,
    program: Program,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
    """Draw a chunk of further tokens of every row; end early when all rows are done.

    Args:
        graph: of `nnx.split(model)`; static.
        params: of `nnx.split(model)`.
        state: donated: its buffers become the result's. Its cache has room for what is drawn.
        ancestors: caches above the completions.
        program: static.

    Returns:
        The state, and what the host reads of it: `step` and `done`.
    """
    # Cast before the loop and not at every token. `decode` would cast each use to the same type;
    # int8 is read as such.
    dtype = nnx.merge(graph, params).dtype
    cast = lambda x: x if x.dtype == jnp.int8 else x.astype(dtype)  # noqa: E731
    model = nnx.merge(graph, jax.tree.map(cast, params))
    batch = state.done.shape
    # And taken apart: what is sliced in the loop is copied at every token.
    layers, above = model.layer_weights(), by_layer(ancestors)
    first, end = state.step, jnp.minimum(state.step + program.chunk, program.limit)
    start = end_of(above, batch)

    def advance(chunk: _Chunk, written: jax.Array, past: Cache) -> _Chunk:
        """Draw a token; the keys of `written` tokens are in `past`."""
        hidden, recent = model.decode(
            chunk.last,
            step=chunk.step - 1 - written,
            start=start + written,
            ancestors=[*above, past],
            own=chunk.recent,
            layers=layers,
        )
        logits = model.logits(hidden)
        token, logp, done = _draw(logits, state.key, chunk.step, chunk.done, program)
        put = functools.partial(
            jax.lax.dynamic_update_index_in_dim, index=chunk.step - first, axis=-1
        )
        return _Chunk(
            step=chunk.step + 1,
            last=token,
            done=done,
            count=chunk.count + ~chunk.done,
            tokens=put(chunk.tokens, token),
            logp=put(chunk.logp, logp),
            recent=recent,
        )

    def fill(loop: tuple[_Chunk, KeyValue]) -> tuple[_Chunk, KeyValue]:
        """Draw tokens until their block is full or the chunk ends; write the block."""
        chunk, past = loop
        written = (chunk.step - 1) // RECENT * RECENT
        until = jnp.minimum(written + RECENT + 1, end)
        cache = Cache(past.key, past.value, jnp.broadcast_to(written, batch))
        chunk = jax.lax.while_loop(
            lambda chunk: (chunk.step < until) & ~jnp.all(chunk.done),
            lambda chunk: advance(chunk, written, cache),
            chunk,
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=written, axis=-2)
        return chunk, jax.tree.map(put, past, chunk.recent)

    chunk = _Chunk(
        step=state.step,
        last=state.last,
        done=state.done,
        count=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((*batch, program.chunk), program.pad_id, jnp.int32),
        logp=jnp.zeros((*batch, program.chunk), jnp.float32),
        recent=state.recent,
    )
    chunk, past = jax.lax.while_loop(
        lambda loop: (loop[0].step < end) & ~jnp.all(loop[0].done), fill, (chunk, state.past)
    )
    state = dataclasses.replace(
        state, step=chunk.step, last=chunk.last, done=chunk.done, past=past, recent=chunk.recent
    )
    drawn = _recorded(state, chunk.tokens, chunk.logp, chunk.count, since=first)
    return dataclasses.replace(state, drawn=drawn), (state.step, state.done)


@functools.partial(jax.jit, static_argnames=("width", "program"))
def grown(past: KeyValue, *, width: int, program: Program) -> KeyValue:
    """Return the cache of what rows have written with `width` slots."""

    def wider(x: jax.Array) -> jax.Array:
        filling = [(0, 0)] * x.ndim
        filling[-2] = (0, width - x.shape[-2])
        return _spread(jnp.pad(x, filling), program.mesh, x.ndim - 4, kv_heads=0)

    return jax.tree.map(wider, past)


@functools.partial(jax.jit, static_argnames="program")
def compact(
    state: DecodeState,
    question: Cache,
    slots: jax.Array,
    *,
    program: Program,
) -> tuple[DecodeState, Cache]:
    """Keep some rows of each tree, every one below a copy of its question.

    No sample changes by it: a row's keys, positions and random numbers go with it.

    Args:
        state: of B = [*, P, G].
        question: the cache above the rows, [*, P].
        slots: [*, R] int32, the places in P·G of the rows to keep; P·G for a slot that holds none.
        program: static.

    Returns:
        The state of [*, R, 1], and the questions' cache of [*, R].
    """
    *trees, questions, group = state.done.shape
    empty = slots == questions * group
    slots = jnp.minimum(slots, questions * group - 1)

    def rows(x: jax.Array, axis: int, places: jax.Array) -> jax.Array:
        """Take along an axis behind that of the trees."""
        index = places.reshape(
            *[1] * (axis - len(trees)), *places.shape, *[1] * (x.ndim - axis - 1)
        )
        return _spread(jnp.take_along_axis(x, index, axis=axis), program.mesh, axis)

    def kept(x: jax.Array, before: int = 0) -> jax.Array:
        axis = before + len(trees)
        flat = x.reshape(*x.shape[:axis], questions * group, *x.shape[axis + 2 :])
        return jnp.expand_dims(rows(flat, axis, slots), axis + 1)

    spare = state.drawn.done.shape[-1] - 1
    of_question = lambda x, before: rows(x, before + len(trees), slots // group)  # noqa: E731
    cache = Cache(
        jax.tree.map(lambda x: of_question(x, 2), question.key),
        jax.tree.map(lambda x: of_question(x, 2), question.value),
        of_question(question.length, 0),
    )
    state = dataclasses.replace(
        state,
        last=kept(state.last),
        done=kept(state.done) | empty[..., None],
        row=jnp.where(empty[..., None], spare, kept(state.row)),
        key=jax.random.wrap_key_data(_kept_keys(state.key, slots)),
        past=jax.tree.map(lambda x: kept(x, 1), state.past),
        recent=jax.tree.map(lambda x: kept(x, 1), state.recent),
    )
    return state, cache


def _kept_keys(keys: jax.Array, slots: jax.Array) -> jax.Array:
    """Return the data of the keys in some slots, [*, R, 1, words]."""
    data = jax.random.key_data(keys)
    flat = data.reshape(*data.shape[: slots.ndim - 1], -1, data.shape[-1])
    return jnp.take_along_axis(flat, slots[..., None], axis=slots.ndim - 1)[..., None, :]


def _draw(
    logits_BV: jax.Array, keys: jax.Array, number: jax.Array, done: jax.Array, program: Program
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw token `number` of every row: token, log-probability, done; rows that were done pad."""
    token, logp = sample(logits_BV, token_keys(keys, number), program.settings)
    stop = functools.reduce(jnp.logical_or, [token == stop for stop in program.stop_ids])
    token = jnp.where(done, program.pad_id, token)
    return token, jnp.where(done, 0.0, logp), done | stop


def _recorded(
    state: DecodeState,
    tokens: jax.Array,
    logp: jax.Array,
    count: jax.Array,
    *,
    since: jax.Array | int = 0,
) -> Drawn:
    """Write tokens [*B, T] from number `since` on to the completions that the slots draw.

    What a chunk has beyond the limit is written nowhere: such places do not exist.
    """
    drawn, width = state.drawn, tokens.shape[-1]
    trees = drawn.length.shape[:-1]
    flat = lambda x: x.reshape(*trees, -1, *x.shape[len(trees) + 2 :])  # noqa: E731
    places = jnp.meshgrid(*map(jnp.arange, trees), jnp.arange(1), indexing="ij")[:-1]
    where = *places, flat(state.row)
    columns = *(place[..., None] for place in where), since + jnp.arange(width)
    return Drawn(
        tokens=drawn.tokens.at[columns].set(flat(tokens), mode="drop"),
        logp=drawn.logp.at[columns].set(flat(logp), mode="drop"),
        length=drawn.length.at[where].add(flat(count)),
        done=drawn.done.at[where].set(flat(state.done)),
    )


def _empty(model: Qwen, batch: Sequence[int], width: int, mesh: Mesh | None) -> KeyValue:
    """Return a zero cache with the questions spread over the mesh."""
    spread = lambda x: _spread(x, mesh, x.ndim - 4, kv_heads=0)  # noqa: E731
    return jax.tree.map(spread, model.empty_cache(batch, width))


def _spread(
    x: jax.Array, mesh: Mesh | None, axis: int, *, kv_heads: int | None = None
) -> jax.Array:
    """Shard the questions' axis, and that of the key-value heads where there is one."""
    if mesh is None:
        return x
    names: list[str | None] = [None] * x.ndim
    names[axis] = "question"
    if kv_heads is not None:
        names[kv_heads] = "kv_heads"
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.spec(tuple(names))))
