"""The jitted programs of a rollout: prefill, the first token, and chunks of further tokens.

All take the parameters as an argument and everything else that shapes a program (graph, settings,
stop tokens, mesh) as a static one: a program is compiled once and serves every step of a run.

Between chunks the batch may change its shape, see `r1re_jax.rollout.state`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r1re_jax.model.qwen import Cache, KeyValue, Qwen, by_layer, end_of
from r1re_jax.model.tree import Level
from r1re_jax.rollout.keys import token_keys
from r1re_jax.rollout.sampling import sample
from r1re_jax.rollout.shapes import RECENT
from r1re_jax.rollout.state import (
    DecodeState,
    Drawn,
    Program,
    along_slots,
    empty_cache,
    recorded,
    spread,
)


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
    *above, level = levels
    questions = level.length.ndim - 1
    if questions >= 0:
        level = jax.tree.map(lambda x: spread(jnp.asarray(x), mesh, questions), level)
    (*_, hidden), caches = model.extend_levels((*above, level), ancestors=ancestors)
    length = caches[-1].length
    last = jnp.maximum(length - 1, 0)[..., None, None]
    return jnp.take_along_axis(hidden, last, axis=-2)[..., 0, :], (*ancestors, *caches)


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
    logits = model.logits(hidden, questions=hidden.ndim - 2)[..., None, :]
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
        past=empty_cache(model, batch, width, program.mesh),
        recent=empty_cache(model, batch, RECENT, program.mesh),
        drawn=blank,
    )
    drawn = recorded(state, token[..., None], logp[..., None], (~done).astype(jnp.int32))
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
    above = by_layer(ancestors)
    loop = _Loop(
        model=model,
        layers=model.layer_weights(),
        above=above,
        start=end_of(above, batch),
        key=state.key,
        first=state.step,
        end=jnp.minimum(state.step + program.chunk, program.limit),
        program=program,
    )
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
        lambda drawn: (drawn[0].step < loop.end) & ~jnp.all(drawn[0].done),
        loop.fill_block,
        (chunk, state.past),
    )
    after = dataclasses.replace(
        state, step=chunk.step, last=chunk.last, done=chunk.done, past=past, recent=chunk.recent
    )
    drawn = recorded(after, chunk.tokens, chunk.logp, chunk.count, since=state.step)
    return dataclasses.replace(after, drawn=drawn), (after.step, after.done)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
    """What stays the same at every token of a chunk.

    Attributes:
        model: casts nothing any more.
        layers: its weights, layer by layer.
        above: caches above the completions, layer by layer.
        start: [*B] int32, position of each completion's first token.
        key: typed row keys [*B].
        first: int32 scalar, number of the chunk's first token.
        end: int32 scalar, number of the token behind its last.
        program: what the loop is compiled for.
    """

    model: Qwen
    layers: Sequence[nnx.State]
    above: Sequence[Cache]
    start: jax.Array
    key: jax.Array
    first: jax.Array
    end: jax.Array
    program: Program

    def fill_block(self, drawn: tuple[_Chunk, KeyValue]) -> tuple[_Chunk, KeyValue]:
        """Draw tokens until their block is full or the chunk ends; write the block to the past."""
        chunk, past = drawn
        written = (chunk.step - 1) // RECENT * RECENT
        until = jnp.minimum(written + RECENT + 1, self.end)
        length = jnp.broadcast_to(written, chunk.done.shape)
        cache = Cache(past.key, past.value, length)
        chunk = jax.lax.while_loop(
            lambda chunk: (chunk.step < until) & ~jnp.all(chunk.done),
            lambda chunk: self.advance(chunk, written, cache),
            chunk,
        )
        put = lambda into, block, axis: (  # noqa: E731
            jax.lax.dynamic_update_slice_in_dim(into, block, written, axis)
        )
        return chunk, along_slots(put, past, chunk.recent)

    def advance(self, chunk: _Chunk, written: jax.Array, past: Cache) -> _Chunk:
        """Draw a token of every row; the keys of `written` tokens are in the past."""
        hidden, recent = self.model.decode(
            chunk.last,
            step=chunk.step - 1 - written,
            start=self.start + written,
            ancestors=[*self.above, past],
            own=chunk.recent,
            layers=self.layers,
        )
        logits = self.model.logits(hidden, questions=hidden.ndim - 3)
        token, logp, done = _draw(logits, self.key, chunk.step, chunk.done, self.program)
        put = functools.partial(
            jax.lax.dynamic_update_index_in_dim, index=chunk.step - self.first, axis=-1
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


def _draw(
    logits_BV: jax.Array, keys: jax.Array, number: jax.Array, done: jax.Array, program: Program
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw token `number` of every row: token, log-probability, done; rows that were done pad."""
    token, logp = sample(logits_BV, token_keys(keys, number), program.settings)
    stop = functools.reduce(jnp.logical_or, [token == stop for stop in program.stop_ids])
    token = jnp.where(done, program.pad_id, token)
    return token, jnp.where(done, 0.0, logp), done | stop
