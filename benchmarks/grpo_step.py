"""One GRPO step (rollout, reward, reference, update) beside TRL, Tunix and our own flat rows.

    python benchmarks/grpo_step.py --shape=704,64,96 --against=trl,tunix,flat

A tiny Qwen2 in float32, 4 questions of 8 completions; SHAPE counts the tokens that all prompts
share, those of a question, and those of a completion. All sides draw as many tokens and do one
update with a KL term. They take turns, so that a machine that slows down slows all of them; ratios
are medians over the rounds. `flat` is the update alone: over rows that are written out whole in
place of the tree, with the same code. The last line is JSON.

The peers live in environments of their own, made by this command where they are missing.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from benchmarks import machine, sides
from benchmarks.environments import peer_python
from benchmarks.tiny_step import GROUP, QUESTIONS, Shape, write_model
from r1re_jax.published import cache_folder

SHAPE = flags.DEFINE_string("shape", "704,64,96", "tokens: SHARED,QUESTION,COMPLETION")
AGAINST = flags.DEFINE_list("against", ["trl", "tunix", "flat"], "any of trl, tunix, flat")
VENVS = flags.DEFINE_string("venvs", str(cache_folder() / "peers"), "environments of the peers")
ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each side takes its turn", lower_bound=1)
TUNIX_MICRO = flags.DEFINE_integer(
    "tunix_micro", QUESTIONS, "questions of a micro-batch of Tunix's: fewer where memory ends"
)
JSON = flags.DEFINE_string("json", "", "write the result to this file, too")
PEERS = ("trl", "tunix")


def peer(name: str, shape: Shape, folder: Path) -> sides.Worker:
    """Start a peer's worker."""
    python = peer_python(name, Path(VENVS.value))
    sizes = {"prompt": shape.prompt, "completion": shape.completion}
    sizes |= {"group": GROUP, "questions": QUESTIONS}
    script = Path(__file__).parent / "peers" / f"{name}_step.py"
    sizes |= {"micro": TUNIX_MICRO.value} if name == "tunix" else {}
    arguments = [word for key, size in sizes.items() for word in (f"--{key}", str(size))]
    command = [str(python), str(script), "--model", str(folder), *arguments]
    return sides.start(name, command, log=folder / f"{name}.log")


def main(argv: list[str]) -> None:
    """Start all sides, let them take turns, and compare."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    unknown = set(AGAINST.value) - {*PEERS, "flat"}
    if unknown:
        raise app.UsageError(f"--against has {sorted(unknown)}; it takes trl, tunix and flat")
    try:
        shape = Shape.parse(SHAPE.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    folder = Path(tempfile.mkdtemp(prefix="grpo_step-"))
    write_model(folder)
    flat = ["update", "flat_update"] if "flat" in AGAINST.value else []
    ours = [sys.executable, "-m", "benchmarks.tiny_step", SHAPE.value, *flat]
    workers = {"ours": sides.start("ours", ours, log=folder / "ours.log")}
    try:
        for name in PEERS:
            if name in AGAINST.value:
                workers[name] = peer(name, shape, folder)
        pieces = {name: worker.woken for name, worker in workers.items()}
        for command in flat:
            pieces[command] = lambda command=command: workers["ours"].work(command)
        seconds = sides.take_turns(pieces, rounds=ROUNDS.value)
    finally:
        for worker in workers.values():
            worker.close()
    ratio = {n: sides.paired_ratio(seconds[n], seconds["ours"]) for n in PEERS if n in seconds}
    if flat:
        ratio["flat"] = sides.paired_ratio(seconds["flat_update"], seconds["update"])
    machine.report(
        {
            "shape": [shape.shared, shape.question, shape.completion],
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "ratio": ratio,
            "rounds": seconds,
            "tunix_micro": TUNIX_MICRO.value,
            "sides": {name: dict(worker.about) for name, worker in workers.items()},
        },
        path=JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
