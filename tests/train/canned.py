"""GRPO steps on canned completions: what an update is given, without compiling a model.

Drawing is replaced by texts that are cut, wrong, right or malformed in turn, the update by one that
notes its micro-batches and moves every parameter by a constant.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.rollout.rollout import Progress, Rollout
from r1re_jax.train import drawing as drawing_module
from r1re_jax.train.grpo import GRPO, GRPOBlock, make_grpo
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.state import TrainState
from r1re_jax.train.update import Programs, StepResult
from tests.tiny import tiny_policy
from tests.train.world import LIMITS, layout_on, mesh_of, source

TEXTS = (
    "<think>tea</think><answer>Likes(e1,e2)</answer>",
    "<think>tea</think><answer>Near</answer>",
    "tea",
    "<think>" + "tea near the old mill " * 9 + "</think>",  # longer than the limit: cut off
    "<think>Ann likes tea near the old mill</think><answer>Likes(e1,e2)</answer>",
)


def completions(shape: tuple[int, ...], *, limit: int = LIMITS.completion) -> Rollout:
    """TEXTS in turn, from one question to the next."""
    encoder = tiny_policy().encoder
    tokens = np.full((*shape, limit), encoder.pad_id, np.int32)
    length, truncated = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for number, where in enumerate(np.ndindex(shape)):
        row = encoder.completion_tokens(TEXTS[(number + number // shape[-1]) % len(TEXTS)])
        truncated[where], row = len(row) > limit, row[:limit]
        tokens[where][: len(row)], length[where] = row, len(row)
    below = np.arange(limit) < length[..., None]
    logp = np.where(below, -(np.sin(np.arange(tokens.size)).reshape(tokens.shape) ** 2), 0)
    return Rollout(tokens=tokens, length=length, logp=logp.astype(np.float32), truncated=truncated)


@dataclasses.dataclass
class Seen:
    """What was asked for and given.

    Attributes:
        drawn: keyword arguments of every rollout.
        blocks: micro-batches of every update, in order.
    """

    drawn: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    blocks: list[GRPOBlock] = dataclasses.field(default_factory=list)

    def joined(self, name: str) -> np.ndarray:
        """A field of all blocks, those of one tree's questions side by side."""
        return np.concatenate([np.asarray(getattr(block, name)) for block in self.blocks], axis=1)


@contextlib.contextmanager
def canned(seen: Seen) -> Iterator[None]:
    """Replace what draws."""

    def generate(graph: Any, params: Any, levels: Any, **asked: Any) -> Rollout:
        seen.drawn.append({"graph": graph, **asked})
        rows = asked["keys"].size
        for tokens in range(asked["chunk"], asked["limit"] + asked["chunk"], asked["chunk"]):
            drawn = min(tokens, asked["limit"])
            asked["on_chunk"](
                Progress(
                    tokens=drawn, limit=asked["limit"], rows_done=0, rows=rows, batch=rows, width=8
                )
            )
        return completions(asked["keys"].shape, limit=asked["limit"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing_module, "prefill", lambda graph, params, levels: (None, ()))
        patch.setattr(drawing_module, "generate", generate)
        yield


def phase_of(settings: GRPOSettings, seen: Seen, **more: Any) -> tuple[GRPO, TrainState]:
    """A phase whose updates are noted, and a state for it."""
    layout, params = layout_on(mesh_of(1, 1, 1))

    def gradient(params: Any, frozen: Any, block: GRPOBlock) -> tuple:
        seen.blocks.append(block)
        names = ("entropy", "ratio", "clip_low", "clip_high", "old_kl", "logp_gap", "sampler_kl")
        names = (*names, "importance", "importance_squared", "sampler_masked")
        sums = {"tokens": np.float32(1)} | {
            name: np.float32(0.125) for name in (*names, "logp_gap_max")
        }
        return jax.tree.map(jnp.ones_like, params), (np.float32(0), sums)

    def apply(state: TrainState, grads: Any) -> TrainState:
        moved = {name: value - 0.5 for name, value in state.params.items()}
        return dataclasses.replace(state, params=moved)

    phase = make_grpo(
        settings,
        **{
            "limits": LIMITS,
            "encoder": tiny_policy().encoder,
            "source": source(trees=settings.trees, questions=settings.questions_drawn),
            "seed": 5,
            "first": 0,
            "layout": layout,
            "reference": None,
            **more,
        },
    )
    add = lambda one, other: jax.tree.map(jnp.add, one, other)  # noqa: E731
    programs = Programs(gradient=gradient, add=add, norm=lambda grads: 1.0, apply=apply, frozen={})
    state = TrainState(step=jnp.int32(0), params=jax.tree.map(jnp.asarray, params), opt_state=())
    return dataclasses.replace(phase, programs=programs), state


def step(settings: GRPOSettings, *, number: int = 1, **more: Any) -> tuple[StepResult, Seen]:
    """Do one step on canned completions."""
    seen = Seen()
    with canned(seen):
        phase, state = phase_of(settings, seen, **more)
        return phase.step(state, number, tick=lambda note: None), seen
