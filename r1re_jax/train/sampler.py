"""The model that draws a step's completions: the one that is trained, or one that is quantised."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from r1re_jax.model.int8 import Quantisation
from r1re_jax.model.quantise import int8_weights, matrix_names, quantise
from r1re_jax.rl.correction import chosen
from r1re_jax.rl.kinds import CorrectionKind
from r1re_jax.train.grpo_settings import QuantiseSettings
from r1re_jax.train.state import Layout, Params, model_layout, model_state


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model that draws with the policy's parameters.

    Attributes:
        layout: the model without its arrays.
        params: all parameters of the policy -> those of the model; only reads them.
    """

    layout: Layout
    params: Callable[[Params], Params] = lambda params: params

    def correction(self, kind: CorrectionKind, *, trained: Layout) -> CorrectionKind:
        """Return how what it draws is corrected; by default it is if it is not what is trained.

        A model that is quantised or computes in another precision has a graph of its own.
        """
        return chosen(kind, sampler_differs=self.layout.graph != trained.graph)


def make_sampler(layout: Layout, settings: QuantiseSettings) -> Sampler:
    """Return what draws for a model, quantised as the settings say.

    Matrices are quantised on the devices, each shard where it is, once a call of `params`: the
    copy lives as long as the drawing. Nothing else is copied.
    """
    if settings == QuantiseSettings():
        return Sampler(layout)
    shapes = {**layout.frozen, **layout.shapes}
    model = nnx.merge(layout.graph, model_state(shapes))
    quantised = quantise(model, weights=settings.weights, cache=settings.cache)
    drawing = model_layout(quantised, layout.mesh)
    if settings.weights is Quantisation.NONE:
        return Sampler(drawing)
    names = matrix_names(model)
    where = {
        name: shape.sharding
        for name, shape in {**drawing.frozen, **drawing.shapes}.items()
        if name not in shapes or name in names
    }
    make = jax.jit(int8_weights, static_argnames="dtype", out_shardings=where)

    def params(of_policy: Params) -> Params:
        matrices = {name: of_policy[name] for name in names}
        return {**of_policy, **make(matrices, dtype=model.dtype)}

    return Sampler(drawing, params)
