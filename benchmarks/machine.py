"""What figures were measured on and with, and where they are written."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


def about() -> dict[str, Any]:
    """The machine and the versions of what is timed."""
    return {
        "machine": {
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def report(result: Mapping[str, Any], *, path: str = "") -> None:
    """Print the result as one line of JSON, the last one; into a file it goes indented."""
    whole = {**result, **about()}
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(whole, indent=2) + "\n", "utf-8")
    print(json.dumps(whole), flush=True)


def _processor() -> str:
    """The processor's name; where the system tells none, its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
