"""What the device does while the host is busy: two GRPO steps, from xprof's own trace.

    python benchmarks/timeline.py --picture=timeline.png

Runs `run.train --profile` on miniworld with GRPO alone. The last line is JSON: seconds of each
named part of the host's work, and how many of them the device was busy in.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks import machine
from benchmarks.sides import ROOT

CONFIG = flags.DEFINE_string("recipe", "configs/miniworld.py", "what to trace")
STEPS = flags.DEFINE_integer("steps", 2, "steps to trace", lower_bound=1)
PICTURE = flags.DEFINE_string("picture", "", "draw the timeline into this file")
JSON = flags.DEFINE_string("json", "", "write the result to this file, too")
# Names that `run.train` gives the parts of its work, in the order of the picture.
PARTS = ("rollout", "reward", "reference", "update", "checkpoint")
Spans = np.ndarray  # [n, 2], begin and end in seconds


def trace(folder: Path) -> list[dict]:
    """Train for a moment; return the events of the trace of the GRPO steps."""
    command = [sys.executable, "-m", "run.train", f"--config={CONFIG.value}"]
    command += [f"--workdir={folder}", f"--profile={STEPS.value}", "--config.sft.steps=0"]
    command += [f"--config.grpo.steps={STEPS.value + 1}", "--config.evaluate.samples=0"]
    # Without refilling no reward decides what is scored; see `r1re_jax.train.grpo`.
    command += ["--config.grpo.refill=0", "--config.grpo.warmup=0"]
    command += ["--config.checkpoint.best=", "--config.checkpoint.every=1"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False
    )
    if result.returncode:
        raise RuntimeError(f"run.train ended with {result.returncode}:\n{result.stderr[-3000:]}")
    (found,) = folder.glob("profile/**/*.trace.json.gz")
    with gzip.open(found) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def spans(events: Sequence[dict]) -> Spans:
    """Return the time in which any of the events runs, as disjoint spans in order."""
    merged: list[list[float]] = []
    for event in sorted(events, key=lambda event: event["ts"]):
        begin, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged).reshape(-1, 2)


def overlap(one: Spans, other: Spans) -> float:
    """Return the seconds that lie in both."""
    begin = np.maximum(one[:, None, 0], other[None, :, 0])
    end = np.minimum(one[:, None, 1], other[None, :, 1])
    return float(np.maximum(end - begin, 0).sum())


def draw(lanes: dict[str, Spans], path: Path) -> None:
    """Draw the lanes from top to bottom."""
    figure, axes = plt.subplots(figsize=(10, 0.45 * len(lanes) + 1), layout="constrained")
    origin = min(lane[0, 0] for lane in lanes.values() if len(lane))
    for place, (name, lane) in enumerate(lanes.items()):
        bars = [(begin - origin, end - begin) for begin, end in lane]
        color = "tab:orange" if name == "device" else "tab:blue"
        axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=color)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    """Trace, count, draw."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    events = trace(Path(tempfile.mkdtemp(prefix="timeline-")) / "run")
    device = spans([event for event in events if "hlo_op" in event.get("args", {})])
    lanes = {name: spans([e for e in events if e["name"] == name]) for name in PARTS}
    if PICTURE.value:
        draw(lanes | {"device": device}, Path(PICTURE.value))
    length = lambda lane: float((lane[:, 1] - lane[:, 0]).sum())  # noqa: E731
    parts = {
        name: {"seconds": length(lane), "device_busy": overlap(lane, device)}
        for name, lane in lanes.items()
    }
    machine.report({"parts": parts, "device_busy": length(device)}, path=JSON.value)


if __name__ == "__main__":
    app.run(main)
