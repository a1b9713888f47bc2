"""From the command to the first update: cold, and with the programs that the first start compiled.

    python benchmarks/startup.py

Starts `run.train` on miniworld with GRPO alone, without evaluation, in an empty work directory, up
to the end of its first step; then once more with the programs that the first start kept.
Seconds of compilation are jax's own (backend, the reading of the cache included). The last line is
JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks import machine
from benchmarks.sides import MARK, ROOT, tell

CONFIG = flags.DEFINE_string("recipe", "configs/miniworld.py", "what to start")
JSON = flags.DEFINE_string("json", "", "write the result to this file, too")
COMPILATION = "/jax/core/compile/backend_compile_duration"
TRACING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


def worker() -> None:
    """Be `run.train`; say how long it took after the first step, and end."""
    import jax

    from r1re_jax.train.grpo import GRPO
    from run import train

    spent = {"compilation": 0.0, "tracing": 0.0, "programs": 0}

    def heard(event: str, seconds: float, **_: object) -> None:
        spent["compilation"] += seconds * (event == COMPILATION)
        spent["programs"] += event == COMPILATION
        spent["tracing"] += seconds * (event in TRACING)

    jax.monitoring.register_event_duration_secs_listener(heard)
    step = GRPO.step

    def first(self: GRPO, *args: object, **more: object) -> None:
        result = step(self, *args, **more)
        jax.block_until_ready(result.state)
        tell({"total": time.time() - float(os.environ["R1RE_BEGAN"]), **spent})
        os._exit(0)

    GRPO.step = first
    app.run(train.main, flags_parser=train.parse)


def started(cache: Path, workdir: Path) -> dict[str, float]:
    """Start once; return what the worker said."""
    command = [sys.executable, "-m", "benchmarks.startup", f"--config={CONFIG.value}"]
    command += [f"--workdir={workdir}", "--config.sft.steps=0", "--config.evaluate.samples=0"]
    command += ["--config.checkpoint.best="]
    environment = {
        "R1RE_CACHE": str(cache),
        "JAX_COMPILATION_CACHE_DIR": "",
        "R1RE_BEGAN": repr(time.time()),
        "R1RE_STARTUP_WORKER": "1",
    }
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False
    )
    for line in result.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(f"run.train ended with {result.returncode}:\n{result.stderr[-3000:]}")


def main(argv: list[str]) -> None:
    """Start twice."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    folder = Path(tempfile.mkdtemp(prefix="startup-"))
    cold = started(folder / "cache", folder / "cold")
    warm = started(folder / "cache", folder / "warm")
    machine.report(
        {
            "cold": cold,
            "warm": warm,
            "compilation": warm["compilation"] / cold["compilation"],
            "total": warm["total"] / cold["total"],
        },
        path=JSON.value,
    )


if __name__ == "__main__":
    if "R1RE_STARTUP_WORKER" in os.environ:
        worker()
    else:
        app.run(main)
