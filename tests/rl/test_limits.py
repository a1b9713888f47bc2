"""At the limits: groups of one, no spread, no tokens, full rows, rewards of any size, NaN below."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.advantages import group_advantages
from r1re_jax.rl.kinds import AdvantageKind, KlKind, LossKind
from r1re_jax.rl.losses import token_weights
from r1re_jax.rl.objective import LossSettings, metrics, objective
from tests.oracles import rl_formulas, rl_gradients

KINDS = [kind.value for kind in LossKind]
ADVANTAGES = [kind.value for kind in AdvantageKind]
P, C, BETA = 2, 4, 0.1
SIZES = [0.0, 3.0, -0.5, -3.0, 1e-38, 1e-30, -1e-12, 1e12, 1e30, -1e30]
property_test = hypothesis.settings(max_examples=40)
groups = st.sampled_from([(1, 1), (3, 1), (1, 2), (2, 5)])
jitted_advantages = jax.jit(group_advantages, static_argnames="kind")


@pytest.mark.parametrize("kind", ADVANTAGES)
@property_test
@hypothesis.given(
    reward_PG=groups.flatmap(lambda s: hnp.arrays(float, s, elements=st.sampled_from(SIZES)))
)
def test_advantages_of_rewards_of_any_size(kind: str, reward_PG: np.ndarray) -> None:
    """Finite, the formula's to fp32's rounding of the rewards, and exactly 0 without spread."""
    got = np.asarray(jitted_advantages(reward_PG, kind=kind), np.float64)
    expected = rl_formulas.advantages(reward_PG, kind)
    largest = np.abs(reward_PG).max(-1, keepdims=True)
    divisor = np.ones_like(largest)
    if kind == "grpo" and reward_PG.shape[-1] > 1:
        divisor = reward_PG.std(-1, ddof=1, keepdims=True) + 1e-4
    elif kind == "batch" and reward_PG.size > 1:
        divisor = reward_PG.std(ddof=1) + 1e-4
    assert np.isfinite(got).all()
    flushed = 1e-37 * (1 + 1 / divisor)  # what lies below fp32's normal numbers may be 0
    tolerance = 2e-6 * (largest / divisor + np.abs(expected)) + flushed
    assert (np.abs(got - expected) <= tolerance).all()
    flat = (reward_PG == reward_PG[:, :1]).all(-1)
    np.testing.assert_array_equal(got[flat], 0)


@st.composite
def batches(draw: st.DrawFn, poison: float = np.nan) -> dict[str, np.ndarray]:
    """Rows of no, one, all or all but one tokens; what lies under the mask is `poison`."""
    group = draw(st.sampled_from([1, 3]))
    lengths = st.one_of(st.just(0), st.just(C), st.sampled_from([0, 1, C - 1, C]))
    length = draw(
        st.one_of(
            st.just([0] * P * group),
            st.just([C] * P * group),
            st.lists(lengths, min_size=P * group, max_size=P * group),
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    mask = np.arange(C) < np.reshape(length, (P, group, 1))
    logp = -rng.exponential(1.5, mask.shape)
    near = lambda: logp + draw(st.sampled_from([0.0, 0.4])) * rng.normal(size=mask.shape)  # noqa: E731
    sizes = st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30, -1e30])
    rows = {"logp": logp, "old": near(), "ref": near()}
    rows = {name: np.where(mask, np.float32(x), poison) for name, x in rows.items()}
    advantage = draw(hnp.arrays(float, (P, group), elements=sizes))
    return rows | {"mask": mask, "advantage": np.float32(advantage).astype(float)}


@functools.partial(jax.jit, static_argnames="settings")
def value_gradient_metrics(
    arrays: dict[str, jax.Array], *, settings: LossSettings
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    def loss(logp: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective(
            logp,
            old_logp_PGC=arrays["old"],
            ref_logp_PGC=arrays["ref"],
            advantage_PG=arrays["advantage"],
            mask_PGC=arrays["mask"],
            weight_PGC=token_weights(arrays["mask"], kind=settings.kind),
            settings=settings,
        )

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["logp"])
    return value, gradient, metrics(sums)


def run(arrays: dict[str, np.ndarray], **settings: object) -> tuple[np.ndarray, np.ndarray, dict]:
    arrays = {n: x if n == "mask" else jnp.asarray(x, jnp.float32) for n, x in arrays.items()}
    out = value_gradient_metrics(arrays, settings=LossSettings(**settings))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), out)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(arrays=batches())
def test_the_objective_of_any_lengths_and_advantages(kind: str, arrays: dict) -> None:
    """Finite, the formula's value and slope, nothing under the mask, and 0 without tokens."""
    value, gradient, measured = run(arrays, kind=kind, kl_coefficient=BETA)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert all(np.isfinite(x).all() for x in measured.values())
    mask = arrays["mask"]
    np.testing.assert_array_equal(gradient[~mask], 0)
    if not mask.any():
        assert value == 0
        assert all(x == 0 for x in measured.values())
        return
    logp, old, ref = (np.where(mask, arrays[n], 0.0) for n in ("logp", "old", "ref"))
    rows = (logp, old, arrays["advantage"], mask)
    kl, kl_slope = rl_gradients.objective_kl(logp, ref, old, mask, kl_kind="k3_plus", kind=kind)
    slope = rl_gradients.policy_gradient(*rows, kind=kind) + BETA * kl_slope
    expected = rl_formulas.policy_loss(*rows, kind=kind) + BETA * kl
    # Advantages of 1e30 and -1e30 may cancel in the sum: rounding is that of its largest term.
    largest = np.where(mask, np.abs(arrays["advantage"])[..., None], 0).max() * (
        1 + np.abs(logp).max()
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 + 1e-5 * largest)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.inf, -np.inf])
@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data())
def test_what_lies_under_the_mask_changes_no_bit(
    kind: str, poison: float, data: st.DataObject
) -> None:
    dirty = data.draw(batches(poison=poison))
    names = ("logp", "old", "ref")
    clean = dirty | {n: np.where(dirty["mask"], dirty[n], -1.0) for n in names}
    clean["advantage"] = np.where(dirty["mask"].any(-1), dirty["advantage"], 1.0)
    settings = dict(kind=kind, kl_coefficient=BETA)
    jax.tree.map(np.testing.assert_array_equal, run(dirty, **settings), run(clean, **settings))


@pytest.mark.parametrize("advantages", ADVANTAGES)
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(
    arrays=batches(),
    reward=st.sampled_from([0.1, 3.0, -3.0, 1e30, 1e-30]),
    gap=st.sampled_from([0.0, 2.0, 200.0, -200.0]),
)
def test_equal_rewards_move_nothing(
    kind: str, advantages: str, arrays: dict, reward: float, gap: float
) -> None:
    """Not even where the ratio leaves fp32: loss and gradient are 0, whatever was drawn."""
    arrays["advantage"] = np.asarray(
        group_advantages(np.full(arrays["advantage"].shape, reward), kind=advantages)
    )
    arrays["old"] = arrays["logp"] - gap
    value, gradient, _ = run(arrays, kind=kind, kl_coefficient=0.0)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kl_kind", list(KlKind))
@hypothesis.settings(max_examples=20)
@hypothesis.given(arrays=batches())
def test_a_policy_that_is_its_reference_has_no_kl(kl_kind: KlKind, arrays: dict) -> None:
    """Value 0; and gradient 0 but for k1, whose gradient does not depend on the reference."""
    arrays["ref"] = arrays["old"] = arrays["logp"]
    arrays["advantage"] = np.zeros(arrays["mask"].shape[:-1])
    value, gradient, measured = run(arrays, kl_kind=kl_kind, kl_coefficient=1.0)
    assert value == measured["kl_loss"] == measured["kl"] == 0
    if kl_kind is KlKind.K1:
        np.testing.assert_allclose(gradient, token_weights(arrays["mask"]), rtol=1e-6)
    else:
        np.testing.assert_array_equal(gradient, 0)
