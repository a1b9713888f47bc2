"""Compiling a rollout before it begins: its programs for every shape that its batch can have.

Nothing is computed. What a program returns is known when it is compiled, and the next one is
compiled for that. Where jax keeps compiled programs (`jax_compilation_cache_dir`) a later start,
also of another process, finds them there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from r1re_jax.model.qwen import Cache
from r1re_jax.model.tree import Level
from r1re_jax.rollout import decode
from r1re_jax.rollout.rollout import Sizes
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.state import DecodeState, Program, compact, grown


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
    ancestors: Sequence[Cache] = (),
    mesh: Mesh | None = None,
) -> Iterator[tuple[str, jax.stages.Compiled]]:
    """Compile what `generate` runs with the same arguments, which may be shapes in place of arrays.

    Dropping rows is compiled for each number of rows that a batch begins with or is cut to from
    the first, and its growing from each width to the next: other pairs are copies that compile in a
    moment.

    Yields:
        Names and programs, one at a time: `prefill`, `start`, and for every shape of the batch
        `decode_<rows>x<slots>`, rows of all trees together. `compact_…` and `grow_…` beside them.
    """
    program = Program(
        settings=settings,
        stop_ids=tuple(int(stop) for stop in stop_ids),
        pad_id=int(pad_id),
        limit=limit,
        chunk=chunk,
        mesh=mesh,
    )
    sizes = Sizes.of(keys.shape, compaction=compaction, program=program)
    model = graph, params
    found, (hidden, caches) = _compiled(
        decode.prefill, *model, tuple(levels), ancestors=tuple(ancestors), mesh=mesh
    )
    yield "prefill", found
    narrowest = sizes.widths[0]
    found, whole = _compiled(
        decode.start_state, *model, hidden, caches, keys, width=narrowest, program=program
    )
    yield "start", found
    trees = keys.shape[:-2]
    for rows in sizes.rows:
        state, above = whole, caches
        if rows < sizes.rows[0]:
            slots = jax.ShapeDtypeStruct((*trees, rows), "int32")
            found, (state, question) = _compiled(compact, whole, caches[-1], slots, program=program)
            above = (*caches[:-1], question)
            yield f"compact_{_shape(state)}", found
        for width in sizes.widths:
            if width > narrowest:
                found, past = _compiled(grown, state.past, width=width, program=program)
                state = DecodeState(**{**vars(state), "past": past})
                yield f"grow_{_shape(state)}", found
            found, _ = _compiled(decode.decode_chunk, *model, state, above, program=program)
            yield f"decode_{_shape(state)}", found


def _compiled(function: Any, *args: Any, **more: Any) -> tuple[jax.stages.Compiled, Any]:
    """Compile a jitted function; return it, and the shapes and shardings of what it returns."""
    found = function.lower(*args, **more).compile()
    shapes = function.eval_shape(*args, **more)
    where = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    return found, jax.tree.map(where, shapes, found.output_shardings)


def _shape(state: Any) -> str:
    """Rows of the batch, and slots of each: 64x128."""
    return f"{state.done.size}x{state.past.value[0].shape[-2]}"
