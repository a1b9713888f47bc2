"""Imports a folder onto the simulated devices and prints what memory that took; a process alone.

python -m tests.model.import_memory FOLDER DTYPE
"""

import json
import pathlib
import sys
import threading

import jax
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model import hf


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory; mapped files do not count."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folder: str, dtype: str) -> None:
    """Print one JSON object of byte counts."""
    mesh = sharding.make_mesh(data=1, fsdp=jax.device_count(), tensor=1)
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    state = nnx.state(hf.load_hf(folder, param_dtype=dtype, mesh=mesh))
    jax.block_until_ready(state)
    done.set()
    watcher.join()
    shards = [shard.data for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    resident = sum(shard.nbytes for shard in shards)
    print(json.dumps({"devices": len(mesh.devices.flat), "rise": peak - before, "held": resident}))


if __name__ == "__main__":
    main(*sys.argv[1:])
