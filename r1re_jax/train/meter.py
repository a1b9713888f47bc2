"""How well a step used its devices: counted arithmetic and bytes over the seconds it took."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.flops import Lengths, decode_bytes, step_flops, tree_load, update_flops
from r1re_jax.model.int8 import Quantisation
from r1re_jax.model.lora import is_adapter
from r1re_jax.model.peaks import peak_of
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Tree
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.state import Layout, model_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meter:
    """What is needed to judge a step's time.

    Attributes:
        config: shape of the model.
        adapter: elements of all matrices of adapters; 0 where all parameters are trained.
        weights: bytes of the sampler's weights that all devices together read at every token.
        itemsize: bytes of an element of its keys.
        own_itemsize: of those of completions.
        copies: devices, or groups of them, that share the questions drawn.
        flops: FLOP/s of all devices together at best; None where that is not known.
        bandwidth: bytes/s of all devices' memory together at best; None likewise.
    """

    config: ModelConfig
    adapter: int
    weights: int
    itemsize: int
    own_itemsize: int
    copies: int
    flops: float | None
    bandwidth: float | None

    def sft(self, tree: Tree, *, seconds: float) -> dict[str, float]:
        """Return `tflops` of a step of the warm start, and `mfu` where the peak is known."""
        load = tree_load(Lengths.of(tree))
        return self._use(update_flops(self.config, load, adapter=self.adapter), seconds)

    def grpo(
        self, drawn: Lengths, kept: Tree, settings: GRPOSettings, *, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Return `tflops` of a GRPO step; where the peak is known also `mfu` and `hbm_use`.

        `hbm_use` takes the bytes of decoding over the seconds of the whole rollout, prefill with
        it: it says too little rather than too much.

        Args:
            drawn: all that was drawn, rounds of P questions side by side.
            kept: what was trained on.
            settings: of the phase.
            seconds: `step_time` and `step_time/rollout` of the step.
        """
        counted = step_flops(
            self.config,
            drawn=drawn,
            kept=Lengths.of(kept),
            scored=bool(settings.kl_coefficient) + (settings.inner_iterations > 1),
            updates=settings.inner_iterations,
            adapter=self.adapter,
        )
        found = self._use(counted.total, seconds["step_time"])
        if self.bandwidth is not None:
            moved = sum(self._decoded(part) for part in _rounds(drawn, settings.questions))
            found["hbm_use"] = moved / seconds["step_time/rollout"] / self.bandwidth
        return found

    def _decoded(self, lengths: Lengths) -> int:
        return decode_bytes(
            self.config,
            lengths,
            weights=self.weights,
            itemsize=self.itemsize,
            own_itemsize=self.own_itemsize,
            copies=self.copies,
        )

    def _use(self, flops: int, seconds: float) -> dict[str, float]:
        rate = flops / seconds
        known = {} if self.flops is None else {"mfu": rate / self.flops}
        return {"tflops": rate / 1e12, **known}


def make_meter(layout: Layout, *, sampler: Layout | None = None) -> Meter:
    """Build the meter of a model on a mesh.

    Args:
        layout: the model that is trained.
        sampler: the one that draws, where it is another.
    """
    sampler, devices = sampler or layout, layout.mesh.devices
    model, drawing = _abstract(layout), _abstract(sampler)
    itemsize = jnp.dtype(drawing.dtype).itemsize
    peak = peak_of(devices.flat[0].device_kind)
    flops = None if peak is None else peak.flops.get(model.dtype.name)
    return Meter(
        config=model.config,
        adapter=sum(shape.size for name, shape in layout.shapes.items() if is_adapter(name)),
        weights=_read(sampler, tied=model.config.tied) * devices.size,
        itemsize=itemsize,
        own_itemsize=1 if drawing.cache is Quantisation.INT8 else itemsize,
        copies=sharding.question_ways(sampler.mesh),
        flops=None if flops is None else flops * devices.size,
        bandwidth=None if peak is None else peak.bandwidth * devices.size,
    )


def _abstract(layout: Layout) -> Qwen:
    """Return the model with shapes in place of arrays."""
    return nnx.merge(layout.graph, model_state({**layout.frozen, **layout.shapes}))


def _read(layout: Layout, *, tied: bool) -> int:
    """Return the bytes that a device reads for a token: all that it holds, and few rows of tokens.

    A tied embedding is the head too.
    """
    shapes = {**layout.frozen, **layout.shapes}
    return sum(
        math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
        for name, shape in shapes.items()
        if tied or name != "embed"
    )


def _rounds(lengths: Lengths, questions: int) -> list[Lengths]:
    """Part what was drawn one round after the other, `questions` a guide at a time."""
    starts = range(0, lengths.question.shape[1], questions)
    parts = [slice(start, start + questions) for start in starts]
    return [
        Lengths(lengths.guide, lengths.question[:, part], lengths.completion[:, part])
        for part in parts
    ]
