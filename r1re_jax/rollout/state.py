"""What a rollout carries from chunk to chunk, and how its batch changes its shape in between.

Finished rows are dropped (`compact`), and the cache of what rows have written grows (`grown`).
Which shapes there can be is known beforehand, see `r1re_jax.rollout.shapes`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from r1re_jax import sharding
from r1re_jax.model.qwen import Cache, KeyValue, Qwen
from r1re_jax.rollout.sampling import SamplingSettings


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
        past: keys and values of whole blocks of RECENT tokens, L arrays of W slots: XLA copies an
            array that it both reads and writes at a token.
        recent: keys and values of the block that is begun, L arrays of RECENT slots.
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


@functools.partial(jax.jit, static_argnames=("width", "program"))
def grown(past: KeyValue, *, width: int, program: Program) -> KeyValue:
    """Return the cache of what rows have written with `width` slots; of a layer or of several."""

    def wider(x: jax.Array, axis: int) -> jax.Array:
        filling = [(0, 0)] * x.ndim
        filling[axis] = (0, width - x.shape[axis])
        return spread(jnp.pad(x, filling), program.mesh, x.ndim - 4, kv_heads=0)

    return along_slots(wider, past)


def layer_by_layer(
    change: Callable[..., tuple[KeyValue, ...]], *caches: KeyValue
) -> tuple[KeyValue, ...]:
    """Change caches a layer at a time; the arguments' arrays are freed.

    So their old and their new arrays never exist all at once: they are most of a device's memory.
    """
    layers = range(len(caches[0].value))
    found = []
    for layer in layers:
        before = tuple(KeyValue((of.key[layer],), (of.value[layer],)) for of in caches)
        found.append(jax.block_until_ready(change(*before)))
        jax.tree.map(lambda x: x.delete(), before)
    together = lambda *arrays: sum(arrays, ())  # noqa: E731
    return tuple(
        KeyValue(together(*(of.key for of in cache)), together(*(of.value for of in cache)))
        for cache in zip(*found, strict=True)
    )


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
        state: of B = [*, P, G]; its caches are freed.
        question: the cache above the rows, [*, P].
        slots: [*, R] int32, the places in P·G of the rows to keep; P·G for a slot that holds none.
        program: static.

    Returns:
        The state of [*, R, 1], and the questions' cache of [*, R].
    """
    of = state.done.shape[-2:]
    own = functools.partial(kept_caches, slots=slots, of=of, program=program)
    rows = {name: getattr(state, name) for name in ("last", "done", "row", "key")}
    spare = state.drawn.done.shape[-1] - 1
    rows, question = kept_rows(rows, question, slots, of=of, spare=spare, program=program)
    past, recent = layer_by_layer(own, state.past, state.recent)
    return dataclasses.replace(state, past=past, recent=recent, **rows), question


@functools.partial(jax.jit, static_argnames=("of", "program"))
def kept_caches(
    *caches: KeyValue, slots: jax.Array, of: tuple[int, int], program: Program
) -> tuple[KeyValue, ...]:
    """Return the rows of [*, P, G] that `compact` keeps, of caches of a layer or of several.

    Args:
        caches: of what rows have written.
        slots: as of `compact`.
        of: P and G.
        program: static.
    """
    return jax.tree.map(lambda x: _kept(x, slots, of, program, before=1), caches)


@functools.partial(jax.jit, static_argnames=("of", "spare", "program"))
def kept_rows(
    rows: dict[str, jax.Array],
    question: Cache,
    slots: jax.Array,
    *,
    of: tuple[int, int],
    spare: int,
    program: Program,
) -> tuple[dict[str, jax.Array], Cache]:
    """Return what else `compact` keeps: of a state by name, and the questions' cache.

    Args:
        rows: `last`, `done`, `row` and `key` of the state.
        question: as of `compact`.
        slots: as of `compact`.
        of: P and G.
        spare: the row that a slot without one draws.
        program: static.
    """
    places, group = of[0] * of[1], of[1]
    empty = (slots == places)[..., None]
    kept = {name: _kept(rows[name], slots, of, program) for name in ("last", "done", "row")}
    kept["done"] |= empty
    kept["row"] = jnp.where(empty, spare, kept["row"])
    kept["key"] = _kept_keys(rows["key"], jnp.minimum(slots, places - 1))
    above = jnp.minimum(slots, places - 1) // group
    take = lambda x: _taken(x, above, program, before=2)  # noqa: E731
    cache = Cache(
        jax.tree.map(take, question.key),
        jax.tree.map(take, question.value),
        _taken(question.length, above, program, before=0),
    )
    return kept, cache


def _kept(
    x: jax.Array, slots: jax.Array, of: tuple[int, int], program: Program, *, before: int = 0
) -> jax.Array:
    """Return the slots of [..., *, P, G, ...] as [..., *, R, 1, ...]."""
    axis, places = before + slots.ndim - 1, of[0] * of[1]
    flat = x.reshape(*x.shape[:axis], places, *x.shape[axis + 2 :])
    slots = jnp.minimum(slots, places - 1)
    return jnp.expand_dims(_taken(flat, slots, program, before=before), axis + 1)


def _taken(x: jax.Array, places: jax.Array, program: Program, *, before: int) -> jax.Array:
    """Take along the axis behind that of the trees; of `before` axes the last are the heads."""
    trees = places.ndim - 1
    axis, heads = before + trees, before - 1 if before else None
    index = places.reshape(*[1] * before, *places.shape, *[1] * (x.ndim - axis - 1))
    taken = jnp.take_along_axis(x, index, axis=axis)
    return spread(taken, program.mesh, axis, kv_heads=heads)


def _kept_keys(keys: jax.Array, slots: jax.Array) -> jax.Array:
    """Return the typed keys in some slots, [*, R, 1]."""
    data = jax.random.key_data(keys)
    flat = data.reshape(*data.shape[: slots.ndim - 1], -1, data.shape[-1])
    taken = jnp.take_along_axis(flat, slots[..., None], axis=slots.ndim - 1)[..., None, :]
    return jax.random.wrap_key_data(taken, impl=jax.random.key_impl(keys))


def recorded(
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


def along_slots(change: Callable, *caches: KeyValue) -> KeyValue:
    """Return `change(arrays, axis)` of the keys and of the values; the axis is that of slots."""
    of = lambda axis: lambda *arrays: change(*arrays, axis)  # noqa: E731
    return KeyValue(
        jax.tree.map(of(-1), *(cache.key for cache in caches)),
        jax.tree.map(of(-2), *(cache.value for cache in caches)),
    )


def empty_cache(model: Qwen, batch: Sequence[int], width: int, mesh: Mesh | None) -> KeyValue:
    """Return a zero cache with the questions spread over the mesh."""
    blank = model.empty_cache(batch, width)
    return jax.tree.map(lambda x: spread(x, mesh, x.ndim - 4, kv_heads=0), blank)


def spread(x: jax.Array, mesh: Mesh | None, axis: int, *, kv_heads: int | None = None) -> jax.Array:
    """Shard the questions' axis, and that of the key-value heads where there is one."""
    if mesh is None:
        return x
    names: list[str | None] = [None] * x.ndim
    names[axis] = "question"
    if kv_heads is not None:
        names[kv_heads] = "kv_heads"
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.spec(tuple(names))))
