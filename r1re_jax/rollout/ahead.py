"""Compiling a rollout before it begins: its programs for every shape that its batch can have.

Nothing is computed. What a program returns is known when it is compiled, and the next one is
compiled for that. Where jax keeps compiled programs (`jax_compilation_cache_dir`) a later start,
also of another process, finds them there.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from r1re_jax.model.qwen import Cache, KeyValue
from r1re_jax.model.tree import Level
from r1re_jax.rollout import decode
from r1re_jax.rollout.rollout import Sizes
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.shapes import RECENT
from r1re_jax.rollout.state import DecodeState, Program, grown, kept_caches, kept_rows

# What rows have written, as `DecodeState` names it.
OWN = ("past", "recent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    """A program that was compiled ahead.

    Attributes:
        name: of the program.
        jaxpr: what it computes.
        compiled: for the devices of its arguments.
        returns: shapes and shardings of what it returns.
        rounds: of its while loops, at most, the outermost first.
        beside: shapes of arrays that are alive while it runs and are none of its arguments, as far
            as they are known where it is compiled.
    """

    name: str
    jaxpr: Any
    compiled: jax.stages.Compiled
    returns: Any
    rounds: tuple[int, ...] = ()
    beside: Any = ()


def compile_ahead(
    name: str,
    function: Any,
    *args: Any,
    rounds: tuple[int, ...] = (),
    beside: Any = (),
    **more: Any,
) -> Ahead:
    """Compile a jitted function for arguments that may be shapes in place of arrays."""
    traced = function.trace(*args, **more)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        error.add_note(name)
        raise

    def shape(x: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        # A sharding on one device is left out, as arrays there have none that was asked for.
        where = where if isinstance(where, NamedSharding) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    returns = jax.tree.map(shape, function.eval_shape(*args, **more), compiled.output_shardings)
    return Ahead(
        name=name,
        jaxpr=traced.jaxpr,
        compiled=compiled,
        returns=returns,
        rounds=rounds,
        beside=beside,
    )


def compile_rollout(
    graph: nnx.GraphDef,
    params: nnx.State,
    levels: Sequence[Level],
    *,
    keys: jax.Array | jax.ShapeDtypeStruct,
    settings: SamplingSettings,
    limit: int,
    stop_ids: Sequence[int],
    pad_id: int,
    chunk: int = 32,
    compaction: int = 0,
    smallest_batch: int = 1,
    smallest_cache: int = 0,
    ancestors: Sequence[Cache] = (),
    mesh: Mesh | None = None,
) -> Iterator[Ahead]:
    """Compile what `generate` runs with the same arguments, which may be shapes in place of arrays.

    Dropping rows is compiled from the first number of them to each other, and growing from the
    first width to each other: what else can follow on what are copies that compile in a moment.

    Yields:
        The programs, one at a time: `question_prefill`, `start`, and for every shape of the batch
        `decode_<rows>x<slots>`, rows of all trees together; before them `compact_…` and `grow_…`
        of a layer's caches (each layer runs them), and `rows_…` of what else is kept.
    """
    program = Program(
        settings=settings,
        stop_ids=tuple(int(stop) for stop in stop_ids),
        pad_id=int(pad_id),
        limit=limit,
        chunk=chunk,
        mesh=mesh,
    )
    sizes, model = (
        Sizes.of(
            keys.shape,
            compaction=compaction,
            smallest_batch=smallest_batch,
            smallest_cache=smallest_cache,
            program=program,
        ),
        (graph, params),
    )
    found = compile_ahead(
        "question_prefill",
        decode.prefill,
        *model,
        tuple(levels),
        ancestors=tuple(ancestors),
        mesh=mesh,
    )
    yield found
    hidden, caches = found.returns
    narrowest, options = sizes.widths[0], {"program": program}
    found = compile_ahead(
        "start", decode.start_state, *model, hidden, caches, keys, width=narrowest, **options
    )
    yield found
    yield from _of_every_shape(model, found.returns, caches, sizes, of=keys.shape)


def _of_every_shape(
    model: tuple[nnx.GraphDef, nnx.State],
    whole: DecodeState,
    caches: Sequence[Cache],
    sizes: Sizes,
    *,
    of: Sequence[int],
) -> Iterator[Ahead]:
    """Compile what draws, for every shape of the batch, and what comes from one to the next.

    Args:
        model: graph and parameters.
        whole: the state that a rollout begins with.
        caches: above the completions.
        sizes: that the batch can have.
        of: [*, P, G], completions.
    """
    params, narrowest, options = model[1], sizes.widths[0], {"program": sizes.program}
    *trees, questions, group = of
    of = {"of": (questions, group), **options}
    for rows in sizes.rows:
        slots = jax.ShapeDtypeStruct((*trees, rows), "int32")
        state, above, count = whole, caches, slots.size
        if rows < sizes.rows[0]:
            cut, others = slots.size, len(whole.past.value) - 1
            fewer = {name: _layers(_layer(getattr(whole, name)), others) for name in OWN}
            beside = params, caches, dataclasses.replace(whole, **fewer)
            small = {name: getattr(whole, name) for name in ("last", "done", "row", "key")}
            spare = {"spare": questions * group, **of}
            found = compile_ahead(
                f"rows_{cut}", kept_rows, small, caches[-1], slots, beside=beside, **spare
            )
            yield found
            small, question = found.returns
            own = tuple(_layer(getattr(whole, name)) for name in OWN)
            name = f"compact_{count}x{narrowest}"
            found = compile_ahead(name, kept_caches, *own, slots=slots, beside=beside, **of)
            yield found
            past, recent = (_layers(cache, len(whole.past.value)) for cache in found.returns)
            state = dataclasses.replace(whole, past=past, recent=recent, **small)
            above = (*caches[:-1], question)
        narrow = state
        for width in sizes.widths:
            if width > narrowest:
                one, name = _layer(narrow.past), f"grow_{count}x{width}"
                found = compile_ahead(name, grown, one, width=width, **options)
                past = _layers(found.returns, len(whole.past.value))
                state = dataclasses.replace(narrow, past=past)
                # At the last layer: all others have grown.
                others = _layers(found.returns, len(whole.past.value) - 1)
                beside = params, above, dataclasses.replace(state, past=others)
                yield dataclasses.replace(found, beside=beside)
            yield compile_ahead(
                f"decode_{count}x{width}",
                decode.decode_chunk,
                *model,
                state,
                above,
                rounds=decode_rounds(sizes.program.chunk),
                **options,
            )


def decode_rounds(chunk: int) -> tuple[int, int]:
    """Return the rounds of a chunk's loops: blocks of tokens, and the tokens of a block."""
    return -(-chunk // RECENT), min(RECENT, chunk)


def _layer(cache: KeyValue) -> KeyValue:
    """Return the first layer's part of a cache."""
    return KeyValue(tuple(cache.key[:1]), tuple(cache.value[:1]))


def _layers(cache: KeyValue, layers: int) -> KeyValue:
    """Return so many layers like the only one of a cache."""
    return KeyValue(tuple(cache.key) * layers, tuple(cache.value) * layers)
