"""A run small enough for tests: a base policy in Hugging Face form, data, and a config for both."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from r1re_jax import sharding
from r1re_jax.files import absolute, read_text
from r1re_jax.model.qwen import Remat, abstract_qwen
from r1re_jax.policy import Limits
from r1re_jax.policy_files import save_policy
from r1re_jax.report.writers import JsonlWriter
from r1re_jax.task.lessons import DatasetSource
from r1re_jax.task.readers import write_jsonl
from r1re_jax.task.relations import Example, Schema, parse_tagged
from r1re_jax.task.rewards import Verdict, relation_reward
from r1re_jax.train.config import read_settings
from r1re_jax.train.hooks import Hooks
from r1re_jax.train.loop import Outcome, run_training
from r1re_jax.train.settings import Settings
from r1re_jax.train.signals import Stopped
from r1re_jax.train.state import Layout, flat_params, model_layout
from tests.tiny import GUIDE, tiny_guide, tiny_policy

# Of this machine or of a bucket.
AnyPath = pathlib.Path | epath.Path
LIMITS = Limits(guide=400, question=48, completion=56)
# What names of figures begin with that depend on the clock: they differ between equal runs.
TIMED = "step_time", "tokens_per_second", "tflops", "mfu", "hbm_use"


def one_device_mesh() -> Mesh:
    """The mesh of the first device: tests compute on one, however many there are."""
    return mesh_of(1, 1, 1)


def mesh_of(data: int, fsdp: int, tensor: int, sequence: int = 1) -> Mesh:
    """A mesh of the first devices."""
    sizes = data, fsdp, sequence, tensor
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, sharding.MESH_AXES, axis_types=sharding.AXIS_TYPES)


def layout_on(
    mesh: Mesh, *, dtype: str = "float32", remat: Remat = Remat.NONE
) -> tuple[Layout, dict[str, np.ndarray]]:
    """The tiny policy's layout, and its parameters on the host."""
    policy = tiny_policy()
    params = flat_params(nnx.state(policy.model))
    model = abstract_qwen(policy.config, dtype=dtype, remat=remat)
    return model_layout(model, mesh), jax.device_get(params)


def examples(count: int = 16) -> tuple[Example, ...]:
    """Short sentences with short thoughts."""
    labels, things = tiny_guide().schema.labels, ("tea", "mill", "cat", "Bob")
    marked = (f"<e1>Ann</e1> likes <e2>{things[i % 4]}</e2>." for i in range(count))
    return tuple(
        dataclasses.replace(
            parse_tagged(text, id=f"e{i}", label=labels[i % len(labels)]), reasoning=f"tea {i}"
        )
        for i, text in enumerate(marked)
    )


def source(*, trees: int, questions: int) -> DatasetSource:
    """Lessons from sixteen tiny examples."""
    return DatasetSource(tiny_guide(), examples(), trees=trees, questions=questions)


def write_inputs(folder: AnyPath) -> AnyPath:
    """Write base/ (a policy), train.jsonl, test.jsonl and guide.md; return the folder."""
    save_policy(tiny_policy(tied=True), folder / "base")
    write_jsonl(folder / "train.jsonl", examples())
    write_jsonl(folder / "test.jsonl", examples(3))
    (folder / "guide.md").write_text(GUIDE)
    return folder


def config(inputs: AnyPath, **changes: Any) -> dict[str, Any]:
    """Two SFT steps, then two of GRPO; `changes` by dotted key with __ for a dot."""
    data = {"kind": "jsonl", "guide": str(inputs / "guide.md")}
    values = {
        "seed": 3,
        "model": {"path": str(inputs / "base")},
        "limits": dataclasses.asdict(LIMITS),
        "data": {
            "train": {**data, "path": str(inputs / "train.jsonl")},
            "eval": {"held": {**data, "path": str(inputs / "test.jsonl")}},
        },
        "sft": {"steps": 2, "questions": 2, "learning_rate": 1e-2},
        "grpo": {"steps": 2, "questions": 2, "group": 2, "learning_rate": 1e-2, "chunk": 8},
        "evaluate": {"every": 0, "samples": 0},
        "checkpoint": {"every": 1, "keep": 2},
        "log": {"completions": 1},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    return values


def settings(inputs: AnyPath, **changes: Any) -> Settings:
    """The config, typed."""
    return read_settings(config(inputs, **changes))


def train(
    settings: Settings,
    workdir: AnyPath,
    *,
    poll: Callable[[], None] = lambda: None,
    progress: Any = None,
) -> Outcome:
    """Run on one device, with metrics.jsonl."""

    def writers(resume_step: int) -> Sequence[JsonlWriter]:
        return (JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step),)

    hooks = Hooks(poll=poll, writers=writers, progress=progress)
    return run_training(settings, workdir, hooks=hooks, mesh=one_device_mesh())


@dataclasses.dataclass
class StopAt:
    """A `Progress` whose `poll` asks to stop at the count-th note that begins with `note`."""

    note: str
    count: int
    signal: int = 15
    seen: int = 0

    def phase(self, name: str, *, total: int, done: int = 0) -> None:
        """Part of `Progress`."""

    def tick(self, note: str = "") -> None:
        """Part of `Progress`."""
        self.seen += note.startswith(self.note)

    @property
    def reached(self) -> bool:
        """Whether the note has been heard."""
        return self.seen >= self.count

    def poll(self) -> None:
        """What the run polls."""
        if self.reached:
            raise Stopped(self.signal)


def some_verdict(text: str, example: Example, schema: Schema, **more: object) -> Verdict:
    """In place of `relation_reward`: rewards that differ where those of random weights do not."""
    real = relation_reward(text, example, schema, **more)
    return dataclasses.replace(real, reward=float(sum(text.encode()) % 7))


def metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what differs between equal runs."""
    lines = read_text(epath.Path(workdir) / "metrics.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


def checkpoint_params(
    workdir: AnyPath, step: int, *, item: str = "params"
) -> Mapping[str, np.ndarray]:
    """Parameters of a checkpoint (or its `reference`), read without a layout."""
    import orbax.checkpoint as ocp

    policy = tiny_policy(tied=True)
    layout = model_layout(policy.model, one_device_mesh())
    with ocp.StandardCheckpointer() as checkpointer:
        folder = absolute(epath.Path(workdir) / "checkpoints" / str(step) / item)
        return jax.device_get(checkpointer.restore(folder, dict(layout.shapes)))


def assert_bit_equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    """Same names, same bits."""
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name, strict=True)
