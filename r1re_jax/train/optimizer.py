"""AdamW with global-norm clipping, warm-up and a schedule, from typed settings."""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from r1re_jax.train.fields import Dtype


class ScheduleKind(enum.StrEnum):
    """How the learning rate goes on after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with clipping and a schedule (`r1re_jax.train.optimizer`).

    Attributes:
        learning_rate: its peak.
        warmup: steps in which it rises linearly from 0.
        schedule: how it goes on.
        decay_steps: of linear and cosine, the step at which it reaches 0; 0 means the phase's
            steps (or the one after the warm-up, in a phase that is shorter). A run that is to be
            extended later fixes it: every step's rate depends on it.
        clip_norm: gradients are scaled down to this global norm; 0 clips nothing.
        weight_decay: decoupled decay of matrices (biases and norms have none).
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        vector_scale: learning rate of vectors (weights of norms, biases) over that of matrices. A
            vector's gradient sums over many more tokens and columns than an entry of a matrix, so
            that it stands out of the noise of few samples.
        first_moment: what the first moment is held in between updates; bfloat16 takes half the
            memory. The second is float32.
    """

    learning_rate: float = 1e-6
    warmup: int = 0
    schedule: ScheduleKind = ScheduleKind.CONSTANT
    decay_steps: int = 0
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    vector_scale: float = 1.0
    first_moment: Dtype = Dtype.FLOAT32

    def __post_init__(self) -> None:
        """Refuse what no optimizer can do."""
        not_negative = ("learning_rate", "warmup", "decay_steps", "clip_norm", "weight_decay")
        for name in (*not_negative, "eps", "vector_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.schedule is ScheduleKind.CONSTANT and self.decay_steps:
            raise ValueError(
                f"decay_steps is {self.decay_steps} but the schedule is constant; set schedule to"
                " linear or cosine, or decay_steps to 0"
            )
        if self.decay_steps and self.decay_steps <= self.warmup:
            raise ValueError(
                f"decay_steps is {self.decay_steps}; it must exceed warmup, {self.warmup}"
            )

    def resolved(self, steps: int) -> "OptimizerSettings":
        """Return these settings with `decay_steps` spelled out for a phase of `steps` steps."""
        if self.schedule is ScheduleKind.CONSTANT or self.decay_steps or not steps:
            return self
        return dataclasses.replace(self, decay_steps=max(steps, self.warmup + 1))


def learning_rate(settings: OptimizerSettings, *, updates_per_step: int = 1) -> Callable:
    """Return the rate as a function of the number of updates already made in the phase.

    With u updates made and w updates of warm-up the factor is (u + 1) / w while u < w, so that no
    update is wasted on a rate of 0; then p, the part of decay_steps that is over, gives 1
    (constant), 1 - p (linear) or (1 + cos πp) / 2 (cosine, arXiv 1608.03983, equation 5).

    Args:
        settings: its steps are those of the phase.
        updates_per_step: inner iterations of a step.
    """
    warmup = settings.warmup * updates_per_step
    total = settings.decay_steps * updates_per_step

    def rate(updates: jax.Array | int) -> jax.Array:
        done = jnp.asarray(updates, jnp.float32)
        rising = jnp.minimum((done + 1) / max(warmup, 1), 1.0)
        over = jnp.clip((done - warmup) / max(total - warmup, 1), 0.0, 1.0)
        match settings.schedule:
            case ScheduleKind.CONSTANT:
                falling = jnp.ones_like(over)
            case ScheduleKind.LINEAR:
                falling = 1 - over
            case ScheduleKind.COSINE:
                falling = (1 + jnp.cos(math.pi * over)) / 2
        return settings.learning_rate * rising * falling

    return rate


def make_optimizer(
    settings: OptimizerSettings, *, matrices: Mapping[str, bool], updates_per_step: int = 1
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind a clip of the gradient's global norm (arXiv 1211.5063).

    Args:
        settings: rates, moments, decay, clip.
        matrices: parameter name -> whether weight decay applies to it.
        updates_per_step: inner iterations of a step.
    """
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(settings, updates_per_step=updates_per_step),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mu_dtype=settings.first_moment.value,
        mask=lambda params: {name: matrices[name] for name in params},
    )
    scale = {name: 1.0 if matrix else settings.vector_scale for name, matrix in matrices.items()}
    scaled = optax.stateless(lambda updates, _: {k: scale[k] * u for k, u in updates.items()})
    return optax.chain(clip, adamw, scaled)
