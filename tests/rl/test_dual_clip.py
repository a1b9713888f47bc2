"""The dual clip against its formula in NumPy: value, gradient, where it binds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.rl.losses import token_policy_loss, token_weights
from r1re_jax.rl.objective import LossSettings, metrics, objective
from tests.oracles import rl_formulas

KINDS = ["grpo", "token_mean", "bnpo", "dr_grpo", "gspo"]
P, G, C = 2, 3, 5


def batch(seed: int) -> tuple[np.ndarray, ...]:
    """Rows whose log-ratio is about ±1.6, both ways for either sign of A; ragged, one empty."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, (P, G, C))
    towards = np.array([[1, 1, -1], [1, -1, 1]])
    old = logp - rng.normal(scale=0.2, size=logp.shape) - 1.6 * towards[..., None]
    advantage = np.abs(rng.normal(size=(P, G))) * [[-1, -1, -1], [1, 1, -1]]
    length = rng.integers(1, C + 1, (P, G))
    length[0, 0] = 0
    return logp, old, advantage, np.arange(C) < length[..., None]


def loss(logp: jax.Array, old, advantage, mask, **more: object) -> jax.Array:
    token, _ = token_policy_loss(logp, old, advantage, mask, **more)
    return jnp.sum(token * token_weights(mask, kind=more["kind"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dual", [1.1, 1.5, 3.0])
@pytest.mark.parametrize("seed", range(2))
def test_value_and_gradient_are_those_of_the_formula(kind: str, dual: float, seed: int) -> None:
    logp, old, advantage, mask = batch(seed)
    value, gradient = jax.value_and_grad(loss)(
        jnp.asarray(logp, jnp.float32), old, advantage, mask, kind=kind, dual_clip=dual
    )

    def formula(x: np.ndarray) -> float:
        return rl_formulas.policy_loss(x, old, advantage, mask, kind=kind, dual=dual)

    np.testing.assert_allclose(value, formula(logp), rtol=1e-4)
    expected = rl_formulas.numeric_gradient(formula, logp)
    np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=1e-6)
    without = rl_formulas.policy_loss(logp, old, advantage, mask, kind=kind)
    assert formula(logp) < without - 1e-3, "the case is one in which it binds"


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "slope", "bound"),
    [
        (-2.0, 5.0, 3.0 * 2, 0.0, 1),  # bad and much likelier: bounded
        (-2.0, 2.5, 2.5 * 2, 2.5 * 2, 0),  # bad and likelier: pushed down in full
        (-2.0, 0.5, 0.8 * 2, 0.0, 0),  # bad and less likely: the usual clip
        (2.0, 5.0, -1.2 * 2, 0.0, 0),  # good: the usual clip
    ],
)
def test_it_binds_for_negative_advantages_beyond_it_alone(
    kind: str, advantage: float, ratio: float, expected: float, slope: float, bound: int
) -> None:
    old, mask = np.full((1, 1, 1), -2.0), np.ones((1, 1, 1), bool)
    logp, a = jnp.asarray(old + np.log(ratio), jnp.float32), np.full((1, 1), advantage)
    more = {"kind": kind, "dual_clip": 3.0}
    value, gradient = jax.value_and_grad(loss)(logp, old, a, mask, **more)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient.item(), slope, rtol=1e-5)
    _, statistics = token_policy_loss(logp, old, a, mask, **more)
    assert statistics["dual_clip"].item() == bound


@pytest.mark.parametrize("kind", KINDS)
def test_off_it_is_not_there(kind: str) -> None:
    arrays = batch(0)
    token, statistics = token_policy_loss(*arrays, kind=kind)
    off, _ = token_policy_loss(*arrays, kind=kind, dual_clip=0.0)
    far, told = token_policy_loss(*arrays, kind=kind, dual_clip=1e6)
    np.testing.assert_array_equal(off, token)
    np.testing.assert_array_equal(far, token)
    assert "dual_clip" not in statistics and not told["dual_clip"].any()


def test_an_overflowing_ratio_is_bounded() -> None:
    old, mask = np.full((1, 1, 2), -201.0), np.ones((1, 1, 2), bool)
    a, logp = np.full((1, 1), -1.0), jnp.full((1, 1, 2), -1.0)
    value, gradient = jax.value_and_grad(loss)(logp, old, a, mask, kind="grpo", dual_clip=3.0)
    np.testing.assert_allclose(value, 3.0, rtol=1e-6)
    assert (np.asarray(gradient) == 0).all()


def test_the_objective_takes_and_reports_it() -> None:
    logp, old, advantage, mask = batch(1)
    weight = token_weights(mask, kind="grpo")
    shared = {"old_logp_PGC": old, "ref_logp_PGC": None, "advantage_PG": advantage}
    shared |= {"mask_PGC": mask, "weight_PGC": weight}
    values = {}
    for dual in (0.0, 1.5):
        settings = LossSettings(kl_coefficient=0.0, dual_clip=dual)
        values[dual], sums = objective(logp, **shared, settings=settings)
        assert ("dual_clip" in metrics(sums)) == (dual > 0)
    assert 0 < metrics(sums)["dual_clip"] < 1
    assert values[1.5] < values[0.0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip is 1.0; .* above 1"),
        ({"dual_clip": -3.0}, "dual_clip is -3.0"),
        ({"dual_clip": float("nan")}, "dual_clip is nan"),
        ({"dual_clip": 3.0, "kind": "cispo"}, "cispo is bounded by clip_high"),
    ],
)
def test_what_has_no_meaning_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**setting)
    with pytest.raises(ValueError, match=message):
        token_policy_loss(*batch(0), **setting)
