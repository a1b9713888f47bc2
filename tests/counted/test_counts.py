"""What a step costs, counted and not timed, against committed figures.

`counts.json` has the figures of the code as it is. A change that makes one larger fails here; one
that makes it smaller should be written down:

    python -m tests.counted.test_counts     # prints the figures as they are now
"""

import dataclasses
import functools
import json
import math
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.tiny_step import Shape, Step
from r1re_jax.model.tree import Level
from r1re_jax.rollout import decode, rollout, shapes
from r1re_jax.rollout.rollout import Progress
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.train.grpo import GRPOBlock
from tests.counted.jaxprs import product_flops

COUNTS = json.loads((pathlib.Path(__file__).parent / "counts.json").read_text())
SHAPES = ("704,64,96", "1472,64,128", "0,256,128")
# Compilers may lay buffers out a little differently from version to version.
BYTES_TOLERANCE = 1.1
ROWS, CAP, COMPACTION = 64, 3072, 3


@functools.cache
def step(shape: str) -> Step:
    return Step(Shape.parse(shape))


def update_flops(shape: str, *, flat: bool = False) -> int:
    """Matrix products of a gradient, what the backward pass computes again included."""
    one = step(shape)
    block = one.flat_block if flat else one.block
    return product_flops(one.phase.programs.gradient, one.state.params, {}, block)


@functools.cache
def update_bytes(shape: str, *, flat: bool = False) -> int:
    """Temporary bytes of the compiled gradient."""
    one = step(shape)
    block: GRPOBlock = one.flat_block if flat else one.block
    lowered = one.phase.programs.gradient.lower(one.state.params, {}, block)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@dataclasses.dataclass
class FakeDecoding:
    """In place of the programs of `decode`: rows end at given lengths, nothing is computed."""

    lengths: np.ndarray

    def state(self, rows: np.ndarray, step: int, width: int) -> Any:
        done = np.where(rows < ROWS, self.lengths[np.minimum(rows, ROWS - 1)] <= step, True)
        past = SimpleNamespace(value=[np.empty((1, *rows.shape, width, 0))])
        return _State(done=done, past=past, row=rows, step=step)

    def prefill(self, *args: Any, **more: Any) -> tuple[None, tuple[None]]:
        return None, (None,)

    def start_state(self, *args: Any, width: int, **more: Any) -> Any:
        return self.state(np.arange(ROWS).reshape(1, 8, 8), 1, width)

    def decode_chunk(self, graph: Any, params: Any, state: Any, *args: Any, program: Any) -> tuple:
        until = min(state.step + program.chunk, program.limit)
        longest = self.lengths[state.row[state.row < ROWS]].max()
        after = self.state(state.row, min(until, longest), state.past.value[0].shape[-2])
        return after, (after.step, after.done)

    def compact(self, state: Any, question: Any, slots: np.ndarray, **more: Any) -> tuple:
        rows = np.append(state.row.reshape(-1), ROWS)[slots].reshape(1, -1, 1)
        return self.state(rows, state.step, state.past.value[0].shape[-2]), None

    def grown(self, past: Any, *, width: int, **more: Any) -> Any:
        return SimpleNamespace(value=[np.empty((*past.value[0].shape[:-2], width, 0))])

    def layer_by_layer(self, change: Any, past: Any) -> tuple:
        return change(past)


@dataclasses.dataclass(frozen=True)
class _State:
    done: np.ndarray
    past: Any
    row: np.ndarray
    step: int

    @property
    def drawn(self) -> None:
        raise _Ended


class _Ended(Exception):
    """The rollout has drawn all it had to."""


def row_steps(seed: int, *, compaction: int = COMPACTION) -> tuple[float, int]:
    """Executed over useful row-steps of long-tailed lengths, and shapes that were used."""
    drawn = np.random.default_rng(seed).normal(math.log(200), 1.0, ROWS)
    lengths = np.clip(np.ceil(np.exp(drawn)), 1, CAP).astype(int)
    fake, seen = FakeDecoding(lengths), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prefill", "start_state", "decode_chunk"):
            patch.setattr(decode, name, getattr(fake, name))
        for name in ("compact", "grown", "layer_by_layer"):
            patch.setattr(rollout, name, getattr(fake, name))
        with pytest.raises(_Ended):
            rollout.generate(
                None,
                None,
                (Level(np.zeros((1, 8, 1), np.int32), np.ones((1, 8), np.int32)),),
                keys=np.empty((1, 8, 8)),
                settings=SamplingSettings(),
                limit=CAP,
                stop_ids=(0,),
                pad_id=0,
                chunk=32,
                compaction=compaction,
                on_chunk=seen.append,
            )
    return _executed(seen) / lengths.sum(), len({(one.batch, one.width) for one in seen})


def _executed(seen: list[Progress]) -> int:
    """Row-steps: one for every row's first token, then those of the chunks."""
    tokens = [1, *(one.tokens for one in seen)]
    parts = (one.batch * (b - a) for one, a, b in zip(seen, tokens, tokens[1:], strict=False))
    return ROWS + sum(parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_computes_no_more_than_it_did(shape: str) -> None:
    assert update_flops(shape) <= COUNTS["update_flops"][shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_holds_no_more_than_it_did(shape: str) -> None:
    assert update_bytes(shape) <= BYTES_TOLERANCE * COUNTS["update_bytes"][shape]


def test_the_tree_computes_less_than_flat_rows() -> None:
    assert update_flops("704,64,96", flat=True) > 6 * update_flops("704,64,96")


def test_the_tree_holds_a_third_of_what_flat_rows_hold() -> None:
    shape = "1472,64,128"
    assert 3 * update_bytes(shape) <= update_bytes(shape, flat=True)


def test_most_row_steps_are_useful() -> None:
    ratios, used = zip(*map(row_steps, range(10)), strict=True)
    assert np.mean(ratios) <= COUNTS["executed_over_useful"] + 1e-3
    assert max(ratios) <= 1.15
    assert max(used) <= COUNTS["shapes_used"]
    whole, _ = row_steps(0, compaction=0)
    assert whole > 3 * ratios[0], "else there would be nothing to drop"


def test_there_are_few_shapes() -> None:
    possible = len(shapes.row_counts(ROWS, steps=COMPACTION)) * len(shapes.widths(CAP))
    assert possible <= COUNTS["shapes_possible"]


def measured() -> dict[str, Any]:
    """The figures of the code as it is."""
    ratios, used = zip(*map(row_steps, range(10)), strict=True)
    return {
        "update_flops": {shape: update_flops(shape) for shape in SHAPES},
        "update_bytes": {shape: update_bytes(shape) for shape in SHAPES},
        "executed_over_useful": round(float(np.mean(ratios)), 3),
        "shapes_used": max(used),
        "shapes_possible": len(shapes.row_counts(ROWS, steps=COMPACTION)) * len(shapes.widths(CAP)),
    }


if __name__ == "__main__":
    print(json.dumps(measured(), indent=2))
