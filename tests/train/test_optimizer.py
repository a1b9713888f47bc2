"""The optimizer against AdamW written out in NumPy float64."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1re_jax.train.optimizer import (
    OptimizerSettings,
    ScheduleKind,
    learning_rate,
    make_optimizer,
)


def _rate(settings: OptimizerSettings, update: int, *, per_step: int = 1) -> float:
    """The schedule as its docstring has it."""
    warmup, total = settings.warmup * per_step, settings.decay_steps * per_step
    if update < warmup:
        return settings.learning_rate * (update + 1) / warmup
    part = min(max((update - warmup) / max(total - warmup, 1), 0), 1)
    factor = {
        "constant": 1.0,
        "linear": 1 - part,
        "cosine": (1 + math.cos(math.pi * part)) / 2,
    }[settings.schedule]
    return settings.learning_rate * factor


@pytest.mark.parametrize("schedule", list(ScheduleKind))
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("per_step", [1, 2])
def test_learning_rate_follows_its_formula(
    schedule: ScheduleKind, warmup: int, per_step: int
) -> None:
    decay = 0 if schedule is ScheduleKind.CONSTANT else 10
    settings = OptimizerSettings(
        learning_rate=2e-3, warmup=warmup, schedule=schedule, decay_steps=decay
    )
    rate = learning_rate(settings, updates_per_step=per_step)
    found = [float(rate(update)) for update in range(24)]
    expected = [_rate(settings, update, per_step=per_step) for update in range(24)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert found[0] > 0, "an update at rate 0 is wasted"


def test_updates_are_those_of_adamw_with_clipping() -> None:
    settings = OptimizerSettings(
        learning_rate=1e-2, warmup=2, clip_norm=0.5, weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-6
    )
    random = np.random.default_rng(0)
    params = {"matrix": random.normal(size=(3, 2)), "bias": random.normal(size=4)}
    optimizer = make_optimizer(settings, matrices={"matrix": True, "bias": False})
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = optimizer.init(ours)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for update in range(4):
        grads = {name: random.normal(size=value.shape) for name, value in params.items()}
        step, state = optimizer.update(
            {name: jnp.asarray(value, jnp.float32) for name, value in grads.items()}, state, ours
        )
        ours = optax.apply_updates(ours, step)
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        scale = min(1.0, 0.5 / norm)
        for name, grad in grads.items():
            first[name] = 0.8 * first[name] + 0.2 * scale * grad
            second[name] = 0.9 * second[name] + 0.1 * (scale * grad) ** 2
            mean = first[name] / (1 - 0.8 ** (update + 1))
            root = np.sqrt(second[name] / (1 - 0.9 ** (update + 1)))
            decay = 0.1 * params[name] if name == "matrix" else 0.0
            params[name] = params[name] - _rate(settings, update) * (mean / (root + 1e-6) + decay)
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_without_a_clip_norm_nothing_is_clipped() -> None:
    grads = {"matrix": jnp.full((2, 2), 100.0)}
    for clip, expected in ((0.0, 100.0), (1.0, 0.5)):
        optimizer = make_optimizer(
            OptimizerSettings(learning_rate=1.0, clip_norm=clip, b1=0.0, eps=1e6),
            matrices={"matrix": True},
        )
        step, _ = optimizer.update(grads, optimizer.init(grads), grads)
        # With eps far above the root the step is gradient / eps.
        np.testing.assert_allclose(step["matrix"], -expected / 1e6, rtol=1e-3)


def test_vectors_take_steps_of_their_own_size() -> None:
    random = np.random.default_rng(1)
    matrices = {"weight": True, "norm": False}
    params = {"weight": random.normal(size=(3, 2)), "norm": random.normal(size=4)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    plain, scaled = (
        make_optimizer(
            OptimizerSettings(learning_rate=0.1, weight_decay=0.2, vector_scale=scale),
            matrices=matrices,
        )
        for scale in (1.0, 50.0)
    )
    states = [plain.init(params), scaled.init(params)]
    for _ in range(3):
        grads = {name: jnp.asarray(random.normal(size=x.shape)) for name, x in params.items()}
        expected, states[0] = plain.update(grads, states[0], params)
        found, states[1] = scaled.update(grads, states[1], params)
        np.testing.assert_array_equal(found["weight"], expected["weight"])
        np.testing.assert_allclose(found["norm"], 50 * expected["norm"], rtol=1e-6)


def test_a_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="vector_scale is -1; it must be at least 0"):
        OptimizerSettings(vector_scale=-1)
