"""What stands between a GRPO step and the machine's arithmetic.

    python benchmarks/roofline.py --shape=0,256,128

Counts the operations of all matrix products that a step's programs do, part by part, as compiled
(padding, masked scores and what is computed again included), and sets beside them the seconds of
each part, and the rates that the machine reaches: in a large product, and in what a decoded token
is made of, the rows of a batch through one layer's MLP after the other. The last line is JSON.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import machine
from benchmarks.tiny_step import CONFIG, GROUP, QUESTIONS, STOP, Shape, Step
from r1re_jax.launch.inspect import matrix_flops
from r1re_jax.rollout.ahead import compile_ahead, compile_rollout
from r1re_jax.rollout.decode import prefill
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.shapes import least_holding, slots, widths
from r1re_jax.train.state import model_state

SHAPE = flags.DEFINE_string("shape", "704,64,96", "tokens: SHARED,QUESTION,COMPLETION")
ROUNDS = flags.DEFINE_integer("rounds", 5, "steps that are timed", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "write the result to this file, too")
LARGE = 2048
REPEATS = 20


def rollout_flops(step: Step) -> int:
    """Return the operations of drawing all completions, none of which ends early."""
    of, tree = step.settings, step.block.tree
    graph, params = step.phase.layout.graph, model_state(step.state.params)
    guide = compile_ahead("guide_prefill", prefill, graph, params, (tree.guide,))
    keys = jax.random.split(jax.random.key(0), (1, QUESTIONS, GROUP))
    limit = step.shape.completion
    found = {
        ahead.name: matrix_flops(ahead.jaxpr)
        for ahead in (
            guide,
            *compile_rollout(
                graph,
                params,
                (tree.question,),
                keys=keys,
                settings=SamplingSettings(),
                limit=limit,
                stop_ids=(STOP,),
                pad_id=0,
                chunk=of.chunk,
                ancestors=guide.returns[1],
                mesh=step.phase.layout.mesh,
            ),
        )
    }
    total = sum(found[name] for name in ("guide_prefill", "question_prefill", "start"))
    for first in range(1, limit, of.chunk):
        until = min(first + of.chunk, limit)
        width = least_holding(widths(limit), slots(until - 1))
        total += (until - first) * found[f"decode_{keys.size}x{width}"]
    return total


def rate(product: Callable, *arrays: jax.Array, flops: int) -> float:
    """Return the operations a second of a jitted function, the median of some calls."""
    jax.block_until_ready(product(*arrays))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(product(*arrays))
        seconds.append(time.perf_counter() - begin)
    return flops / statistics.median(seconds)


def rates() -> dict[str, float]:
    """Return what the machine reaches in float32."""
    random = lambda *shape: jax.random.normal(jax.random.key(0), shape)  # noqa: E731
    square = random(LARGE, LARGE)
    rows, inner, outer = QUESTIONS * GROUP, CONFIG.width, CONFIG.mlp_width
    one = lambda: (random(inner, outer), random(inner, outer), random(outer, inner))  # noqa: E731
    layers = [one() for _ in range(CONFIG.layers)]

    @jax.jit
    def chain(x: jax.Array, layers: list[tuple[jax.Array, ...]]) -> jax.Array:
        for gate, up, down in layers:
            x = ((x @ gate) * (x @ up)) @ down
        return x

    narrow = 2 * rows * 3 * inner * outer * CONFIG.layers
    return {
        "large": rate(jax.jit(jnp.matmul), square, square, flops=2 * LARGE**3),
        "rows_of_a_token": rate(chain, random(rows, inner), layers, flops=narrow),
    }


def main(argv: list[str]) -> None:
    """Count, time, compare."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    step = Step(Shape.parse(SHAPE.value))
    flops = {
        "rollout": rollout_flops(step),
        "reference": matrix_flops(
            step.phase.score.trace(step.phase.reference, step.block.tree).jaxpr
        ),
        "update": matrix_flops(
            step.phase.programs.gradient.trace(step.state.params, {}, step.block).jaxpr
        ),
    }
    for _ in range(2):
        step.step()
    seconds: dict[str, list[float]] = {name: [] for name in flops}
    for _ in range(ROUNDS.value):
        step.step()
        for name, times in seconds.items():
            times.append(step.metrics[f"seconds_{name}"])
    found = {name: statistics.median(times) for name, times in seconds.items()}
    reached = rates()
    least = {name: count / reached["large"] for name, count in flops.items()}
    machine.report(
        {
            "shape": [step.shape.shared, step.shape.question, step.shape.completion],
            "flops": flops,
            "seconds": found,
            "seconds_at_rate_of_large_product": least,
            "share_of_rate": {name: least[name] / found[name] for name in found},
            "flops_per_second": reached,
        },
        path=JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
