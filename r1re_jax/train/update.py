"""One update from micro-batches: gradients added up, checked, and only then applied."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from r1re_jax.model.qwen import Qwen
from r1re_jax.sharding import on_device
from r1re_jax.train.state import Layout, Params, TrainState, abstract_state, model_state

# (model, block) -> the block's part of the loss, and named sums. Names that end in _max are maxima.
Loss = Callable[[Qwen, Any], tuple[jax.Array, dict[str, jax.Array]]]
MAXIMUM = "_max"


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not a finite number; the parameters have not been touched."""


class SamplerDriftError(RuntimeError):
    """Sampler and trainer disagree on the log-probabilities of the same tokens."""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What the micro-batches of one update add up to.

    Attributes:
        params: name -> gradient.
        norm: its global norm, before clipping.
        loss: the loss.
        sums: named sums and maxima of the loss function.
    """

    params: Params
    norm: float
    loss: float
    sums: dict[str, float]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A completed step.

    Attributes:
        state: after the update.
        metrics: figures of the step by name.
        completions: one JSON-able row per question, of GRPO; see `r1re_jax.train.grpo`.
    """

    state: TrainState
    metrics: dict[str, float]
    completions: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of an update; each compiles once for a whole run.

    Attributes:
        frozen: parameters that are not trained, by name.
        gradient: (params, frozen, block) -> (gradient, (loss, sums)).
        add: (gradient, gradient) -> their sum; the first is donated.
        norm: gradient -> global norm.
        apply: (state, gradient) -> state; the state is donated.
    """

    frozen: Params
    gradient: Callable
    add: Callable
    norm: Callable
    apply: Callable

    def whole(self, params: Params) -> Params:
        """Return all parameters of the model: the trained ones given, and the frozen ones."""
        return {**self.frozen, **params}


def make_programs(
    loss: Loss,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    frozen: Params | None = None,
) -> Programs:
    """Compile-ready programs for a loss.

    Args:
        loss: takes the model and a block of arrays; its values over the blocks of a step add up to
            the loss and sums of the whole step.
        layout: the model without its arrays.
        optimizer: makes the update from the whole gradient.
        frozen: arrays of `layout.frozen`.
    """

    def of_params(
        params: Params, frozen: Params, block: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(nnx.merge(layout.graph, model_state({**frozen, **params})), block)

    def gradient(
        params: Params, frozen: Params, block: Any
    ) -> tuple[Params, tuple[jax.Array, dict[str, jax.Array]]]:
        value, grads = jax.value_and_grad(of_params, has_aux=True)(params, frozen, block)
        return grads, value

    def apply(state: TrainState, grads: Params) -> TrainState:
        moments = on_device(state.opt_state)
        updates, opt_state = optimizer.update(grads, moments, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step, params=params, opt_state=opt_state)

    # Results keep the arguments' shardings, so that no step is compiled a second time.
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, layout))
    return Programs(
        frozen=frozen or {},
        gradient=jax.jit(gradient, out_shardings=(layout.shardings, layout.replicated)),
        add=jax.jit(
            lambda total, more: jax.tree.map(jnp.add, total, more),
            donate_argnums=0,
            out_shardings=layout.shardings,
        ),
        norm=jax.jit(optax.tree.norm),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=state_shardings),
    )


@functools.partial(jax.profiler.annotate_function, name="update")
def compute_gradient(
    programs: Programs,
    params: Params,
    micro_batches: Iterable[Any],
    *,
    tick: Callable[[], None],
) -> Gradient:
    """Add up the gradient over micro-batches.

    Args:
        programs: of the loss.
        params: what is trained; only read.
        micro_batches: blocks of arrays.
        tick: called on the host before every micro-batch; what it raises ends the step.

    Raises:
        NonFiniteError: the loss or the gradient's norm is no finite number.
    """
    total, parts = None, []
    for block in micro_batches:
        tick()
        grads, part = programs.gradient(params, programs.frozen, block)
        total = grads if total is None else programs.add(total, grads)
        parts.append(part)
    norm = float(programs.norm(total))
    losses, sums = zip(*jax.device_get(parts), strict=True)
    loss = float(np.sum(losses, dtype=np.float64))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(f"the loss is {loss} and the gradient's norm {norm}")
    return Gradient(params=total, norm=norm, loss=loss, sums=_combined(sums))


def completed(state: TrainState) -> TrainState:
    """Return the state with one more completed step."""
    return dataclasses.replace(state, step=state.step + 1)


def _combined(sums: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Add sums and take the largest of maxima, in float64."""
    return {
        name: float(
            (np.max if name.endswith(MAXIMUM) else np.sum)([part[name] for part in sums], axis=0)
        )
        for name in sums[0]
    }
