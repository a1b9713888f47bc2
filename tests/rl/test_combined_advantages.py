"""Several rewards: each normalised over its group, then added, against plain NumPy."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.advantages import combined_advantages, group_advantages
from tests.oracles import rl_formulas

KINDS = ["grpo", "mean_only", "batch", "rloo"]


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=20)
@hypothesis.given(seed=st.integers(0, 2**31), number=st.integers(1, 3))
def test_it_is_the_weighted_sum_of_the_parts(kind: str, seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    reward = rng.choice([-1.0, 0.0, 1.0], (number, 3, 4)) * rng.choice([0.01, 1, 50])
    weight = rng.uniform(0.1, 3, number).tolist()
    got = combined_advantages(reward.astype(np.float32), weight, kind=kind)
    expected = np.zeros((3, 4))
    for one, of in zip(weight, reward.astype(np.float32), strict=True):
        expected += one * rl_formulas.advantages(of, kind)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_reward_of_weight_one_is_group_advantages(kind: str) -> None:
    reward = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    got = combined_advantages(reward[None], (1.0,), kind=kind)
    np.testing.assert_array_equal(got, group_advantages(reward, kind=kind))


def test_rows_that_sum_to_the_same_are_told_apart() -> None:
    """Added up first, (1, 0) and (0, 1) would be equal; apart, the rarer one stands out more."""
    formed, right = np.array([[1.0, 0, 0, 0]]), np.array([[0, 1.0, 1.0, 0]])
    (got,) = np.asarray(combined_advantages(np.stack([formed, right]), (1.0, 1.0)))
    (summed,) = np.asarray(group_advantages(formed + right))
    assert summed[0] == summed[1]
    assert abs(got[0] - got[1]) > 0.1


def test_weights_and_rewards_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="there are 2 rewards and 1 weights"):
        combined_advantages(np.zeros((2, 1, 3)), (1.0,))
    with pytest.raises(ValueError, match="there are 0 rewards"):
        combined_advantages(np.zeros((0, 1, 3)), ())
