"""What a run holds on each device, from its settings alone: the least memory that it needs.

What programs need for themselves comes on top; `run.compile` knows it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r1re_jax import sharding
from r1re_jax.launch.needs import shape_bytes
from r1re_jax.launch.topology import GIB
from r1re_jax.model.flops import key_bytes
from r1re_jax.model.int8 import Quantisation
from r1re_jax.train.batch import grpo_blocks
from r1re_jax.train.optimizer import make_optimizer
from r1re_jax.train.settings import Phase, Settings
from r1re_jax.train.start import abstract_model, run_layout, run_sampler
from r1re_jax.train.state import Layout, abstract_state, model_state


class HoldingsError(ValueError):
    """A run that cannot fit its devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdings:
    """Bytes on each device.

    Attributes:
        policy: parameters, frozen ones too.
        moments: of the optimizer.
        reference: of the KL term.
        gradient: added up so far, and a micro-batch's own.
        copy: of the policy, to draw with.
        cache: keys and values of completions, at the full length.
    """

    policy: int
    moments: int
    reference: int = 0
    gradient: int = 0
    copy: int = 0
    cache: int = 0

    @property
    def drawing(self) -> int:
        """While completions are drawn."""
        return self.policy + self.moments + self.reference + self.copy + self.cache

    @property
    def updating(self) -> int:
        """While the gradient is computed."""
        return self.policy + self.moments + self.reference + self.gradient

    def facts(self) -> dict[str, str]:
        """Return them for people."""
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown |= {"while drawing": self.drawing, "while updating": self.updating}
        return {name: f"{size / GIB:.3f} GiB" for name, size in shown.items() if size}

    def check(self, limit: int | None) -> None:
        """Refuse more than a device has; None where that is not known.

        Raises:
            HoldingsError: with what could be done.
        """
        most = max(self.drawing, self.updating)
        if limit is not None and most > limit:
            raise HoldingsError(
                f"the run holds {most / GIB:.2f} GiB on each device, which has {limit / GIB:.2f}:"
                f" {', '.join(f'{name} {size}' for name, size in self.facts().items())}. Share it"
                " among more devices (mesh.fsdp), or try grpo.first_moment=bfloat16,"
                " mesh.moments_on_host=True, a shorter limits.completion, a smaller grpo.group or"
                " lora.rank"
            )


def held(settings: Settings, mesh: Mesh) -> Holdings:
    """Return what a run holds; of its phases, what the larger holds."""
    layout = run_layout(settings, mesh)
    policy = {**layout.frozen, **layout.shapes}
    of = settings.phases[Phase.GRPO] if Phase.GRPO in settings.phases else settings.sft
    optimizer = make_optimizer(of.optimizer, matrices=layout.matrices)
    state = abstract_state(optimizer, layout)
    gradient = shape_bytes(layout.shapes)
    found = Holdings(
        policy=shape_bytes(policy), moments=shape_bytes(state.opt_state), gradient=gradient
    )
    if Phase.GRPO not in settings.phases:
        return found
    several = len(list(grpo_blocks(settings.grpo))) > 1
    return dataclasses.replace(
        found,
        gradient=gradient * (2 if several else 1),
        reference=_reference(settings, layout),
        copy=_copy(settings, layout),
        cache=_cache(settings, layout),
    )


def _reference(settings: Settings, layout: Layout) -> int:
    """A frozen one is held as the forward computes; one that follows the policy, as that is."""
    of = settings.grpo
    if not of.kl_coefficient or settings.mesh.reference_on_host:
        return 0
    size = shape_bytes(layout.shapes)
    return size if of.reference.every else size * _itemsize(layout) // 4


def _copy(settings: Settings, layout: Layout) -> int:
    sampler = run_sampler(settings, layout, settings.grpo.quantise)
    policy = {*layout.frozen, *layout.shapes}
    own = [x for n, x in sampler.layout.shapes.items() if n in sampler.copied or n not in policy]
    return shape_bytes(own)


def _cache(settings: Settings, layout: Layout) -> int:
    """All rows at their limit, shared by questions and heads."""
    of, mesh = settings.grpo, layout.mesh
    drawing = sharding.drawing_mesh(mesh, tensor=settings.mesh.drawing_tensor)
    size = 1 if of.quantise.cache is Quantisation.INT8 else _itemsize(layout)
    tokens = of.trees * of.questions * of.group * settings.training_limits.completion
    ways = sharding.question_ways(drawing) * drawing.shape["tensor"]
    config = abstract_model(settings).config
    return tokens * key_bytes(config, itemsize=size) // ways


def _itemsize(layout: Layout) -> int:
    shapes = {**layout.frozen, **layout.shapes}
    return jnp.dtype(nnx.merge(layout.graph, model_state(shapes)).dtype).itemsize


def device_limit() -> int | None:
    """Return the memory of a device; None where it does not say, as CPUs do not."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")
