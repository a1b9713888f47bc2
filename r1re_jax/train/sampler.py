"""The model that draws a step's completions: a copy of the policy as drawing wants it.

It is held in the type that the forward computes in, or as int8, and laid out for decoding
(`r1re_jax.sharding.Rule`), where that is not how the policy itself is held.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r1re_jax.model.int8 import Quantisation
from r1re_jax.model.quantise import int8_weights, matrix_names, quantise
from r1re_jax.rl.correction import chosen
from r1re_jax.rl.kinds import CorrectionKind
from r1re_jax.train.grpo_settings import QuantiseSettings
from r1re_jax.train.state import Layout, Params, drawing_layout, model_state


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model that draws with the policy's parameters.

    Attributes:
        layout: the model without its arrays.
        copied: names of the policy's parameters that are copied for it; the others are shared.
        relayout: jitted, those parameters -> what takes their place; moves them from device to
            device and never through the host.
    """

    layout: Layout
    copied: tuple[str, ...]
    relayout: jax.stages.Wrapped

    def params(self, of_policy: Params) -> Params:
        """Return the model's parameters; the copy lives as long as the result."""
        if not self.copied:
            return of_policy
        shared = {name: x for name, x in of_policy.items() if name not in self.copied}
        return {**shared, **self.relayout({name: of_policy[name] for name in self.copied})}

    def correction(self, kind: CorrectionKind, *, trained: Layout) -> CorrectionKind:
        """Return how draws are corrected; by default they are if made in other numbers."""
        return chosen(kind, sampler_differs=_numbers(self.layout) != _numbers(trained))


def make_sampler(
    layout: Layout, settings: QuantiseSettings, *, mesh: Mesh | None = None
) -> Sampler:
    """Return what draws for a model, quantised as the settings say.

    Args:
        layout: the model with the policy's parameters.
        settings: what it stores as int8: quantised on the devices, each shard where it is.
        mesh: that it draws on, the same devices in the same order; None for the policy's.
    """
    shapes = {**layout.frozen, **layout.shapes}
    model = nnx.merge(layout.graph, model_state(shapes))
    int8 = matrix_names(model) if settings.weights is Quantisation.INT8 else ()
    if settings != QuantiseSettings():
        model = quantise(model, weights=settings.weights, cache=settings.cache)
    drawing = drawing_layout(model, mesh or layout.mesh)
    copied = tuple(n for n in shapes if not _same(shapes[n], drawing.shapes[n]))
    kept = shapes.keys() - set(copied)

    def relayout(params: Params) -> Params:
        matrices = {name: params[name] for name in int8}
        others = {name: x.astype(model.dtype) for name, x in params.items() if name not in int8}
        return others | int8_weights(matrices, dtype=model.dtype)

    where: Mapping[str, jax.sharding.Sharding] = {
        name: shape.sharding for name, shape in drawing.shapes.items() if name not in kept
    }
    return Sampler(drawing, copied, jax.jit(relayout, out_shardings=where))


def _numbers(layout: Layout) -> tuple:
    """Return what a model computes and stores in."""
    shapes = {**layout.frozen, **layout.shapes}
    model = nnx.merge(layout.graph, model_state(shapes))
    int8 = sorted(name for name, shape in shapes.items() if shape.dtype == jnp.int8)
    return model.dtype, model.cache, int8


def _same(one: jax.ShapeDtypeStruct, other: jax.ShapeDtypeStruct) -> bool:
    """Whether an array of one is an array of the other."""
    if one.dtype != other.dtype:
        return False
    return one.sharding.is_equivalent_to(other.sharding, len(one.shape))
