"""Group advantages against NumPy float64, and what must hold of any of them."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.advantages import group_advantages
from r1re_jax.rl.kinds import AdvantageKind
from tests.oracles import rl_formulas

KINDS = [kind.value for kind in AdvantageKind]

# The rewards of the task, and others that fp32 holds exactly.
rewards = hnp.arrays(
    np.float64,
    st.sampled_from([(1, 1), (3, 1), (1, 4), (2, 2), (4, 6)]),
    elements=st.one_of(
        st.sampled_from([3.0, -0.5, -3.0]), st.integers(-40, 40).map(lambda i: i / 8)
    ),
)
property_test = hypothesis.settings(max_examples=40)
jitted = jax.jit(group_advantages, static_argnames="kind")


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(reward_PG=rewards)
def test_agrees_with_the_formula(kind: str, reward_PG: np.ndarray) -> None:
    got = jitted(reward_PG, kind=kind)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rl_formulas.advantages(reward_PG, kind), rtol=1e-4, atol=1e-5)


def test_grpo_by_hand() -> None:
    # Group 1: mean 1, deviations 2, -1, -1, n-1 std sqrt(6/2). Group 2 has no spread.
    got = group_advantages(np.array([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    std = np.sqrt(3) + 1e-4
    np.testing.assert_allclose(got, [[2 / std, -1 / std, -1 / std], [0, 0, 0]], rtol=1e-6)


def test_batch_std_is_that_of_the_pooled_rewards() -> None:
    # Each group has deviation 1 around its own mean, but all four rewards range over 0 … 12.
    got = group_advantages(np.array([[0.0, 2.0], [10.0, 12.0]]), kind="batch")
    std = np.std([0, 2, 10, 12], ddof=1) + 1e-4
    np.testing.assert_allclose(got, np.array([[-1, 1], [-1, 1]]) / std, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_group_of_one_is_exactly_zero(kind: str) -> None:
    got = group_advantages(np.array([[3.0], [-0.5]]), kind=kind)
    np.testing.assert_array_equal(got, np.zeros((2, 1)))
    np.testing.assert_array_equal(group_advantages(np.array([[3.0]]), kind=kind), [[0.0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, -0.5, 1 / 3, 1e6 + 0.1])
def test_no_spread_is_exactly_zero(kind: str, value: float) -> None:
    # In fp32 the mean of seven times 0.1 is not 0.1; that noise must not become an advantage.
    reward = np.stack([np.full(7, value), np.arange(7.0)])
    got = np.asarray(group_advantages(reward, kind=kind))
    np.testing.assert_array_equal(got[0], np.zeros(7))
    assert (got[1] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_rewards_of_any_size_have_the_advantages_of_the_formula(kind: str, size: float) -> None:
    """The square of 1e30 is no fp32 number, and that of 1e-30 is 0: the deviation must not care."""
    reward = np.array([[3.0, -0.5, -3.0, 3.0], [1.0, 1.0, 1.0, 2.0]]) * size
    got, expected = group_advantages(reward, kind=kind), rl_formulas.advantages(reward, kind)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float16, bool])
def test_any_real_dtype(kind: str, dtype: type) -> None:
    reward = np.array([[1, 0, 1, 1], [0, 0, 0, 1]])
    np.testing.assert_array_equal(
        group_advantages(reward.astype(dtype), kind=kind),
        group_advantages(reward.astype(np.float32), kind=kind),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_reward_is_not_hidden(kind: str) -> None:
    got = group_advantages(np.array([[1.0, np.nan], [1.0, 2.0]]), kind=kind)
    assert np.isnan(got[0]).all()
    assert np.isnan(group_advantages(np.array([[np.nan]]), kind=kind)).all()


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(reward_PG=rewards, seed=st.integers(0, 99))
def test_order_within_groups_and_of_groups_is_free(
    kind: str, reward_PG: np.ndarray, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(reward_PG.shape[0])
    members = rng.permutation(reward_PG.shape[1])
    whole = np.asarray(jitted(reward_PG, kind=kind))
    moved = jitted(reward_PG[groups][:, members], kind=kind)
    np.testing.assert_allclose(moved, whole[groups][:, members], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(reward_PG=rewards, shift=st.integers(-16, 16))
def test_a_shift_of_all_rewards_changes_nothing(
    kind: str, reward_PG: np.ndarray, shift: int
) -> None:
    np.testing.assert_allclose(
        jitted(reward_PG + shift, kind=kind),
        jitted(reward_PG, kind=kind),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(reward_PG=rewards)
def test_each_group_sums_to_zero(kind: str, reward_PG: np.ndarray) -> None:
    advantage = np.asarray(jitted(reward_PG, kind=kind))
    np.testing.assert_allclose(advantage.sum(1), 0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_more_leading_axes_are_more_groups(kind: str) -> None:
    reward_NPG = np.random.default_rng(0).normal(size=(2, 3, 4))
    got = group_advantages(reward_NPG, kind=kind)
    flat = group_advantages(reward_NPG.reshape(6, 4), kind=kind)
    np.testing.assert_allclose(got.reshape(6, 4), flat, rtol=1e-6)


def test_string_and_enum_mean_the_same_and_it_jits() -> None:
    reward = np.array([[1.0, 2.0, 4.0]])
    expected = group_advantages(reward, kind="rloo")
    np.testing.assert_allclose(jitted(reward, kind=AdvantageKind.RLOO), expected, rtol=1e-6)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'zscore'.*'grpo', 'mean_only', 'batch', 'rloo'"):
        group_advantages(np.ones((2, 2)), kind="zscore")
    with pytest.raises(ValueError, match="scalar"):
        group_advantages(1.0)
