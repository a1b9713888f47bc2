"""The clip in all four quadrants: value and gradient on each side of each unequal bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.rl.kinds import LossKind
from r1re_jax.rl.losses import policy_loss

LOW, HIGH = 0.1, 0.4
EDGE = 1e-3
# All kinds clip; cispo clips the weight and not the objective.
KINDS = [kind.value for kind in LossKind]
# Ratio; then, for A > 0 and for A < 0, the value of min(ρA, clip(ρ)A) / A and its slope in log ρ.
QUADRANTS = {
    "far below": (0.5, (0.5, 0.5), (1 - LOW, 0.0)),
    "just below": (1 - LOW - EDGE, (1 - LOW - EDGE, 1 - LOW - EDGE), (1 - LOW, 0.0)),
    "just inside, low": (1 - LOW + EDGE,) + ((1 - LOW + EDGE,) * 2,) * 2,
    "on policy": (1.0, (1.0, 1.0), (1.0, 1.0)),
    "just inside, high": (1 + HIGH - EDGE,) + ((1 + HIGH - EDGE,) * 2,) * 2,
    "just above": (1 + HIGH + EDGE, (1 + HIGH, 0.0), (1 + HIGH + EDGE, 1 + HIGH + EDGE)),
    "far above": (2.0, (1 + HIGH, 0.0), (2.0, 2.0)),
}


def value_and_slope(
    kind: str, ratios: np.ndarray, advantage: float, **clip: float
) -> tuple[float, np.ndarray, dict]:
    """Loss of one row of tokens with these ratios, its gradient, and the statistics."""
    old = np.full((1, 1, len(ratios)), -1.0)
    logp = jnp.asarray(old + np.log(ratios), jnp.float32)
    rest = (old, np.full((1, 1), advantage), np.ones(old.shape))
    loss = lambda x: policy_loss(x, *rest, kind=kind, **clip)  # noqa: E731
    (value, aux), slope = jax.value_and_grad(loss, has_aux=True)(logp)
    return float(value), np.asarray(slope)[0, 0], aux


@pytest.mark.parametrize("place", QUADRANTS)
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_by_quadrant(kind: str, advantage: float, place: str) -> None:
    ratio, positive, negative = QUADRANTS[place]
    value, slope = positive if advantage > 0 else negative
    if kind == "cispo":  # whatever the sign: the bounded ratio weights log π, here log ρ − 1
        slope = min(max(ratio, 1 - LOW), 1 + HIGH)
        value = slope * (np.log(ratio) - 1)
    got, gradient, aux = value_and_slope(kind, [ratio], advantage, clip_low=LOW, clip_high=HIGH)
    np.testing.assert_allclose(got, -advantage * value, rtol=1e-5)
    np.testing.assert_allclose(gradient, [-advantage * slope], rtol=1e-5)
    above, below = ratio > 1 + HIGH, ratio < 1 - LOW
    if kind != "cispo":
        above, below = above and advantage > 0, below and advantage < 0
    assert (aux["clip_low"], aux["clip_high"]) == (below, above)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gspo", "cispo")])
def test_a_clipped_token_does_not_silence_its_neighbours(kind: str, advantage: float) -> None:
    ratios = np.array([2.0, 1.0, 0.5])
    _, gradient, _ = value_and_slope(kind, ratios, advantage, clip_low=LOW, clip_high=HIGH)
    passed = ratios.copy()
    passed[0 if advantage > 0 else 2] = 0
    np.testing.assert_allclose(gradient, -advantage * passed / 3, rtol=1e-5)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_gspo_clips_rows_and_not_tokens(advantage: float) -> None:
    """Tokens far outside both bounds, a row's geometric mean of 1: nothing is clipped."""
    ratios = np.array([4.0, 0.25])
    clip = {"clip_low": LOW, "clip_high": HIGH}
    got, gradient, aux = value_and_slope("gspo", ratios, advantage, **clip)
    np.testing.assert_allclose(got, -advantage, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.full(2, -advantage / 2), rtol=1e-5)
    assert (aux["clip_low"], aux["clip_high"]) == (0, 0)
    # And one token that drags the row outside silences both where the sign agrees.
    _, gradient, aux = value_and_slope("gspo", np.array([4.0, 1.0]), advantage, **clip)
    expected = 0.0 if advantage > 0 else -advantage * 2 / 2
    np.testing.assert_allclose(gradient, np.full(2, expected), rtol=1e-5)
    assert aux["clip_high"] == (advantage > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_that_nothing_reaches_change_nothing(kind: str) -> None:
    ratios = np.array([0.01, 0.5, 1.0, 3.0])
    wide = {"clip_low": 1.0, "clip_high": 5.0}
    for advantage in (1.5, -1.5):
        value, gradient, aux = value_and_slope(kind, ratios, advantage, **wide)
        mean = np.exp(np.log(ratios).mean())
        if kind == "gspo":
            expected, slope = mean, np.full(4, mean)
        elif kind == "cispo":
            expected, slope = (ratios * (np.log(ratios) - 1)).mean(), ratios
        else:
            expected, slope = ratios.mean(), ratios
        np.testing.assert_allclose(value, -advantage * expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, -advantage * slope / 4, rtol=1e-5)
        assert (aux["clip_low"], aux["clip_high"]) == (0, 0)
