"""How the cost of a step grows with the guide, the group and the completions.

    python benchmarks/scaling.py

The step of `grpo_step.py` at (704, 64, 96) with 8 completions of a question, beside one with twice
the guide, twice the group, and twice the completion, in turn. Each ratio of seconds stands beside
that of the floating-point operations that the tree needs (`r1re_jax.model.flops`). The last line is
JSON.
"""

import dataclasses
import statistics
from collections.abc import Callable

from absl import app, flags

from benchmarks import machine, sides
from benchmarks.tiny_step import CONFIG, GROUP, QUESTIONS, Shape, Step
from r1re_jax.model.flops import Lengths, step_flops

ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each side takes its turn", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "write the result to this file, too")
BASE = Shape(704, 64, 96)
SIDES = {
    "base": (BASE, GROUP),
    "guide_doubled": (dataclasses.replace(BASE, shared=2 * BASE.shared), GROUP),
    "group_doubled": (BASE, 2 * GROUP),
    "completion_doubled": (dataclasses.replace(BASE, completion=2 * BASE.completion), GROUP),
}


def flops(shape: Shape, group: int) -> int:
    """Operations of a step, all its parts."""
    lengths = Lengths.even(
        guide=shape.shared,
        question=shape.question,
        completion=shape.completion,
        questions=QUESTIONS,
        group=group,
    )
    return step_flops(CONFIG, drawn=lengths, kept=lengths).total


def main(argv: list[str]) -> None:
    """Let all sizes take turns."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    pieces: dict[str, Callable[[], float]] = {}
    for name, (shape, group) in SIDES.items():
        step = Step(shape, group=group)
        for _ in range(2):
            step.timed()
        pieces[name] = step.timed
    seconds = sides.take_turns(pieces, rounds=ROUNDS.value)
    result = {}
    for name, side in SIDES.items():
        if name != "base":
            result[name] = sides.paired_ratio(seconds[name], seconds["base"])
            result[f"{name}_flops"] = flops(*side) / flops(*SIDES["base"])
    result["seconds"] = {name: statistics.median(times) for name, times in seconds.items()}
    machine.report({**result, "rounds": seconds}, path=JSON.value)


if __name__ == "__main__":
    app.run(main)
