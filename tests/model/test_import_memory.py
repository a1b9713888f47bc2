"""A checkpoint of 1.5 billion parameters comes in within the memory that its shards need."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Generator

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from r1re_jax.model import hf
from r1re_jax.model.config import PRESETS, ModelConfig
from r1re_jax.model.names import BY_OURS, Form
from r1re_jax.model.qwen import abstract_qwen
from tests.simulated import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = PRESETS["qwen2.5-1.5b"]
FILES = 4


def write_checkpoint(folder: pathlib.Path, config: ModelConfig) -> None:
    """Write bfloat16 shards of small numbers, one shard in memory at a time."""
    state = nnx.to_flat_state(nnx.state(abstract_qwen(config)))
    shapes = {
        theirs: shape
        for path, variable in state
        for theirs, shape in BY_OURS[".".join(map(str, path))].tensors(Form.HF, variable.shape)
    }
    numbers = np.random.default_rng(0).normal(scale=0.02, size=4099).astype(jnp.bfloat16)
    names, files = list(shapes), {}
    for file in range(FILES):
        part = f"model-{file + 1:05d}-of-{FILES:05d}.safetensors"
        mine = names[file::FILES]
        save_file({name: np.resize(numbers, shapes[name]) for name in mine}, folder / part)
        files |= dict.fromkeys(mine, part)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(hf.hf_config(config, dtype="bfloat16")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Generator[pathlib.Path]:
    """Yield the checkpoint's folder, and remove it after: 3 GB are not to be kept."""
    folder = tmp_path_factory.mktemp("large")
    write_checkpoint(folder, CONFIG)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "dtype"), [(8, "float32"), (8, "bfloat16"), (1, "bfloat16")])
def test_import_needs_the_shards_and_two_tensors(
    checkpoint: pathlib.Path, devices: int, dtype: str
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.model.import_memory", str(checkpoint), dtype],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla_flags(devices)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["devices"] == devices
    parameters = sum(
        np.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(abstract_qwen(CONFIG)))
    )
    size = jnp.dtype(dtype).itemsize
    assert parameters > 1.5e9 and found["held"] >= size * parameters, "some are replicated"
    largest = size * CONFIG.vocab * CONFIG.width
    assert found["rise"] <= found["held"] + 2 * largest
