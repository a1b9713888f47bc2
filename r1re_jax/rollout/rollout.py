"""Questions in, completions out: prefill, first token, and chunks until all rows are done."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r1re_jax import hosts, sharding
from r1re_jax.model.qwen import Cache
from r1re_jax.model.tree import Level
from r1re_jax.rollout import decode
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.shapes import least_holding, row_counts, slots, widths
from r1re_jax.rollout.state import DecodeState, Drawn, Program, compact, grown, layer_by_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions as they were drawn; [*, P, G] are the batch dimensions of the keys.

    Attributes:
        tokens: [*, P, G, C] int32; the pad id from `length` on.
        length: [*, P, G] int32, tokens of each completion; its stop token is one of them.
        logp: [*, P, G, C] fp32, log-probability of each token as it was drawn (at the temperature,
            no token filtered; at temperature 1 where greedy); 0 from `length` on.
        truncated: [*, P, G] bool: the sampler drew no stop token within the limit.
    """

    tokens: jax.Array
    length: jax.Array
    logp: jax.Array
    truncated: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a rollout is, between two chunks.

    Attributes:
        tokens: tokens drawn of every row that is not done.
        limit: most tokens of a row.
        rows_done: completions that have ended.
        rows: completions in all.
        batch: rows of the compiled batch, finished and blank ones included.
        width: slots of a row in the cache of completions.
    """

    tokens: int
    limit: int
    rows_done: int
    rows: int
    batch: int
    width: int


def generate(
    graph: nnx.GraphDef,
    params: nnx.State,
    levels: Sequence[Level],
    *,
    keys: jax.Array,
    settings: SamplingSettings,
    limit: int,
    stop_ids: Sequence[int],
    pad_id: int,
    chunk: int = 32,
    compaction: int = 0,
    smallest_batch: int = 1,
    smallest_cache: int = 0,
    ancestors: Sequence[Cache] = (),
    on_chunk: Callable[[Progress], None] | None = None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Draw G completions of every question.

    Guide and questions are computed once and shared by what is below them. A question of length 0
    stands for none (to fill up a batch): its completions have length 0 and are not truncated.

    Args:
        graph: of `nnx.split(model)`.
        params: of `nnx.split(model)`.
        levels: what is above the completions, the questions last: (guide [N, S], question
            [N, P, Q]), or (question [P, Q],) alone.
        keys: typed row keys [N, P, G] (or [P, G]) from `keys.row_keys`.
        settings: how tokens are drawn.
        limit: C, most tokens of a completion, the stop token included.
        stop_ids: tokens that end a completion, one at least.
        pad_id: written behind the end of a completion.
        chunk: tokens between two calls of `on_chunk`; changes no sample.
        compaction: how many sizes of the batch there are from one to its half; finished rows are
            dropped between chunks where that makes it smaller and there is a chunk to come. 0: it
            keeps its size. Changes no sample.
        smallest_batch: rows of a tree that the batch has at least.
        smallest_cache: slots that the cache of completions begins with, before it doubles; 0 for
            `shapes.NARROWEST`.
        ancestors: caches (`decode.prefill`) above the levels, such as a guide's that batches share.
        on_chunk: called on the host after every chunk; what it raises ends the rollout.
        mesh: spreads the questions over the mesh's data axes.

    Raises:
        ValueError: limit or chunk below 1, compaction below 0, no stop token, or keys that do not
            fit the questions.
    """
    keys = hosts.everywhere(keys, mesh)
    _check(levels[-1], keys, limit=limit, chunk=chunk, compaction=compaction, stop_ids=stop_ids)
    program = Program(
        settings=settings,
        stop_ids=tuple(int(stop) for stop in stop_ids),
        pad_id=int(pad_id),
        limit=limit,
        chunk=chunk,
        mesh=mesh,
    )
    above = {"ancestors": tuple(ancestors), "mesh": mesh}
    hidden, caches = decode.prefill(graph, params, tuple(levels), **above)
    sizes = Sizes.of(
        keys.shape,
        compaction=compaction,
        smallest_batch=smallest_batch,
        smallest_cache=smallest_cache,
        program=program,
    )
    width = sizes.widths[0]
    state = decode.start_state(graph, params, hidden, caches, keys, width=width, program=program)
    step, done = 1, hosts.on_host(state.done)
    while True:
        if step < limit and not done.all():
            state, caches = sizes.fitted(state, caches, done=done, step=step)
            state, told = decode.decode_chunk(graph, params, state, caches, program=program)
            step, done = int(told[0]), hosts.on_host(told[1])
        if on_chunk is not None:
            on_chunk(_progress(state, step=step, done=done, limit=limit, rows=keys.size))
        if step == limit or done.all():
            break
    return _rollout(state.drawn, keys.shape)


def _progress(
    state: DecodeState, *, step: int, done: np.ndarray, limit: int, rows: int
) -> Progress:
    return Progress(
        tokens=step,
        limit=limit,
        rows_done=rows - int(np.sum(~done)),
        rows=rows,
        batch=done.size,
        width=state.past.value[0].shape[-2],
    )


def _check(
    question: Level,
    keys: jax.Array,
    *,
    limit: int,
    chunk: int,
    compaction: int,
    stop_ids: Sequence[int],
) -> None:
    """Refuse arguments of `generate` that have no meaning."""
    if limit < 1 or chunk < 1:
        raise ValueError(f"limit is {limit} and chunk is {chunk} tokens; both must be at least 1")
    if compaction < 0:
        raise ValueError(f"compaction is {compaction} sizes; it must be at least 0")
    if not stop_ids:
        raise ValueError(
            "there is no stop token: every completion would run to the limit; give stop_ids"
        )
    questions = question.length.shape
    if keys.shape[:-1] != questions:
        raise ValueError(
            f"keys have shape {list(keys.shape)} and the questions {list(questions)}; expected keys"
            " [*questions, G]"
        )


def _rollout(drawn: Drawn, shape: Sequence[int]) -> Rollout:
    """Give completions [*, P, G] the shape of their keys, without the spare one of a tree."""
    rows = lambda x, axis: jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)  # noqa: E731
    take = lambda x: rows(x, -2).reshape(*shape, -1)  # noqa: E731
    flag = lambda x: rows(x, -1).reshape(shape)  # noqa: E731
    return Rollout(
        tokens=take(drawn.tokens),
        length=flag(drawn.length),
        logp=take(drawn.logp),
        truncated=~flag(drawn.done),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes that a rollout's batch can have.

    Attributes:
        rows: of a tree, falling.
        widths: of the cache of what rows have written, rising.
        program: what the rollout is compiled for.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    program: Program

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        *,
        compaction: int,
        program: Program,
        smallest_batch: int = 1,
        smallest_cache: int = 0,
    ) -> "Sizes":
        """Those of completions [*, P, G]; arguments as of `generate`."""
        ways = 1 if program.mesh is None else sharding.question_ways(program.mesh)
        whole = shape[-2] * shape[-1]
        rows = row_counts(whole, steps=compaction, ways=ways, smallest=smallest_batch)
        slots = widths(program.limit, smallest=smallest_cache)
        return cls(rows=rows, widths=slots, program=program)

    def fitted(
        self, state: DecodeState, caches: Sequence[Cache], *, done: np.ndarray, step: int
    ) -> tuple[DecodeState, tuple[Cache, ...]]:
        """Drop finished rows and make room for a chunk, where that gives another shape."""
        chunk, limit = self.program.chunk, self.program.limit
        active = ~done.reshape(*done.shape[:-2], -1)
        count = least_holding(self.rows, active.sum(-1).max())
        # For less than a chunk another program is not worth its compilation.
        if count < active.shape[-1] and limit - step >= chunk:
            kept = _slots(active, count)
            state, question = compact(state, caches[-1], kept, program=self.program)
            caches = (*caches[:-1], question)
        width = least_holding(self.widths, slots(min(step + chunk, limit) - 1))
        if width > state.past.value[0].shape[-2]:
            wider = lambda past: (grown(past, width=width, program=self.program),)  # noqa: E731
            (past,) = layer_by_layer(wider, state.past)
            state = dataclasses.replace(state, past=past)
        return state, tuple(caches)


def _slots(active: np.ndarray, count: int) -> np.ndarray:
    """Return [*, count] int32: the active places of each tree, then the number of all places."""
    places = active.shape[-1]
    order = np.argsort(~active, axis=-1, kind="stable")[..., :count].astype(np.int32)
    return np.where(np.take_along_axis(active, order, axis=-1), order, np.int32(places))
