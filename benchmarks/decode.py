"""Decoding completions of very uneven lengths: how much of the work is useful.

    python benchmarks/decode.py

64 completions, 8 of each of 8 questions under one guide, of a tiny Qwen2 in float32. Each ends at a
length of its own, drawn log-normal (median 200, sigma 1, at most 3,072 tokens). With finished rows
dropped between chunks and without it, in turn, after a first run of each that compiles.

A row-step is one row of the compiled batch at one token, finished and blank rows included; useful
ones are tokens of completions. The last line is JSON.
"""

import dataclasses
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import machine, sides
from benchmarks.tiny_step import CONFIG, STOP, WORDS
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Level
from r1re_jax.rollout import decode, shapes
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Progress, Rollout, generate
from r1re_jax.rollout.sampling import SamplingSettings

SEED = flags.DEFINE_integer("seed", 0, "of the lengths", lower_bound=0)
MEDIAN = flags.DEFINE_integer("median", 200, "tokens", lower_bound=1)
SIGMA = flags.DEFINE_float("sigma", 1.0, "deviation of the lengths' logarithm", lower_bound=0)
LIMIT = flags.DEFINE_integer("limit", 3072, "most tokens of a completion", lower_bound=2)
CHUNK = flags.DEFINE_integer("chunk", 32, "tokens drawn at a time", lower_bound=1)
COMPACTION = flags.DEFINE_integer(
    "compaction", 3, "batch sizes from one to its half", lower_bound=1
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "how often each side takes its turn", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "write the result to this file, too")
GUIDE, QUESTION, QUESTIONS, GROUP = 704, 64, 8, 8


@dataclasses.dataclass
class Count:
    """What a rollout computed.

    Attributes:
        executed: row-steps.
        shapes: (rows, slots) of the batches.
    """

    executed: int = 0
    shapes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    tokens: int = 0

    def __call__(self, progress: Progress) -> None:
        """Hear of a chunk."""
        if not self.tokens:
            self.executed, self.tokens = progress.rows, 1  # the first token, of every row
        self.executed += progress.batch * (progress.tokens - self.tokens)
        self.tokens = progress.tokens
        self.shapes.add((progress.batch, progress.width))


def lengths(keys: jax.Array) -> jax.Array:
    """Return the length of every completion, a function of its row's key; [*B] int32."""
    normal = jax.vmap(jax.random.normal)(keys.reshape(-1)).reshape(keys.shape)
    drawn = jnp.exp(math.log(MEDIAN.value) + SIGMA.value * normal)
    return jnp.clip(jnp.ceil(drawn), 1, LIMIT.value).astype(jnp.int32)


def ending_by_length() -> None:
    """Let a row end at its length, whatever it draws."""
    draw = decode._draw

    def draw_until(logits: jax.Array, keys: jax.Array, number: jax.Array, *more: object) -> tuple:
        token, logp, done = draw(logits, keys, number, *more)
        return token, logp, done | (number + 1 >= lengths(keys))

    decode._draw = draw_until


def main(argv: list[str]) -> None:
    """Draw with compaction and without, in turn."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    ending_by_length()
    graph, params = nnx.split(Qwen(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    full = lambda *of: np.full(of[:-1], of[-1], np.int32)  # noqa: E731
    draw = lambda *of: rng.integers(0, WORDS, of, np.int32)  # noqa: E731
    levels = (
        Level(draw(1, GUIDE), full(1, GUIDE)),
        Level(draw(1, QUESTIONS, QUESTION), full(1, QUESTIONS, QUESTION)),
    )
    ids = example_ids("benchmark", [str(i) for i in range(QUESTIONS)])[None]
    keys = row_keys(SEED.value, Purpose.GENERATE, 0, ids, range(GROUP))

    def rollout(compaction: int, count: Count) -> Rollout:
        return jax.block_until_ready(
            generate(
                graph,
                params,
                levels,
                keys=keys,
                settings=SamplingSettings(),
                limit=LIMIT.value,
                stop_ids=(STOP,),
                pad_id=WORDS,
                chunk=CHUNK.value,
                compaction=compaction,
                on_chunk=count,
            )
        )

    def timed(compaction: int) -> float:
        begin = time.perf_counter()
        rollout(compaction, Count())
        return time.perf_counter() - begin

    compact, whole = Count(), Count()
    found, same = rollout(COMPACTION.value, compact), rollout(0, whole)
    useful = int(found.length.sum())
    seconds = sides.take_turns(
        {"compact": lambda: timed(COMPACTION.value), "whole": lambda: timed(0)},
        rounds=ROUNDS.value,
    )
    rows = QUESTIONS * GROUP
    machine.report(
        {
            "executed_over_useful": compact.executed / useful,
            "executed_over_useful_whole": whole.executed / useful,
            "tokens_per_second": useful / statistics.median(seconds["compact"]),
            "speed_up": sides.paired_ratio(seconds["whole"], seconds["compact"]),
            "compiled_shapes": len(compact.shapes),
            "possible_shapes": len(shapes.row_counts(rows, steps=COMPACTION.value))
            * len(shapes.widths(LIMIT.value)),
            "same_tokens": bool((found.tokens == same.tokens).all()),
            "rows": rows,
            "lengths": {"seed": SEED.value, "useful": useful, "longest": int(found.length.max())},
            "settings": {
                flag.name: flag.value for flag in (MEDIAN, SIGMA, LIMIT, CHUNK, COMPACTION)
            },
            "rounds": seconds,
        },
        path=JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
