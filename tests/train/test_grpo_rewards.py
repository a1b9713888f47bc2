"""What a GRPO step is rewarded for: parts by themselves, long completions, and those cut off."""

import dataclasses

import numpy as np
import pytest

from r1re_jax.task.rewards import RewardTotals
from r1re_jax.task.tasks import TaskKind, make_task
from r1re_jax.train.grpo_settings import GRPOSettings
from tests.oracles import rl_formulas
from tests.tiny import tiny_policy
from tests.train.canned import completions, step
from tests.train.world import LIMITS

SETTINGS = GRPOSettings(steps=4, questions=4, group=5, kl_coefficient=0.0)
LONG = 20  # tokens of the buffer


def _with(**changes: object) -> GRPOSettings:
    return dataclasses.replace(SETTINGS, **changes)


def _of_samples(result, name: str) -> np.ndarray:
    return np.array([[sample[name] for sample in row["samples"]] for row in result.completions])


def test_one_total_is_the_default() -> None:
    result, seen = step(SETTINGS)
    rewards = _of_samples(result, "reward")
    assert {3.0, -0.5, -3.0} == set(rewards.ravel().tolist())
    expected = rl_formulas.advantages(rewards, "grpo")
    np.testing.assert_allclose(seen.joined("advantage_NPG")[0], expected, rtol=1e-4)
    assert "rewards" not in result.completions[0]["samples"][0]
    assert not any(name.startswith("rewards/") for name in result.metrics)


def test_totals_are_the_runs_own() -> None:
    reward = RewardTotals(correct=3.0, wrong=-1.0, malformed=-3.0)
    encoder = tiny_policy().encoder.for_task(make_task(TaskKind.RELATION, reward=reward))
    result, _ = step(SETTINGS, encoder=encoder)
    assert {3.0, -1.0, -3.0} == set(_of_samples(result, "reward").ravel().tolist())


@pytest.mark.parametrize("kind", ["grpo", "mean_only", "rloo", "batch"])
def test_parts_are_normalised_each_by_itself(kind: str) -> None:
    result, seen = step(_with(rewards={"format": 0.5, "answer": 2.0}, advantage=kind))
    right, formed = _of_samples(result, "correct"), _of_samples(result, "format_ok")
    expected = 0.5 * rl_formulas.advantages(formed.astype(float), kind)
    expected += 2.0 * rl_formulas.advantages(right.astype(float), kind)
    np.testing.assert_allclose(seen.joined("advantage_NPG")[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(_of_samples(result, "advantage"), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(_of_samples(result, "reward"), 0.5 * formed + 2.0 * right)
    assert result.completions[0]["samples"][0]["rewards"].keys() == {"format", "answer"}
    np.testing.assert_allclose(result.metrics["rewards/format/mean"], formed.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.metrics["rewards/answer/mean"], right.mean(), rtol=1e-6)


def test_a_group_has_signal_where_any_part_differs() -> None:
    """Of refilling: rewards that add up to the same are not the same."""
    total, _ = step(_with(rewards={"format": 1.0}))
    assert total.metrics["groups_drawn"] == 4 and total.metrics["groups_dropped"] == 0
    signal = [len(set(row)) > 1 for row in _of_samples(total, "format_ok").tolist()]
    assert total.metrics["frac_reward_zero_std"] == 1 - np.mean(signal)


def _overlong(result) -> np.ndarray:
    """Equation 13 of arXiv 2503.14476, row by row."""
    limit, out = LIMITS.completion, []
    for tokens, cut in zip(
        _of_samples(result, "tokens").ravel(), _of_samples(result, "truncated").ravel(), strict=True
    ):
        if cut:
            out.append(-1.0)
        elif tokens <= limit - LONG:
            out.append(0.0)
        else:
            out.append(((limit - LONG) - tokens) / LONG)
    return np.array(out).reshape(len(result.completions), -1)


def test_long_completions_lose_reward() -> None:
    result, seen = step(_with(overlong_buffer=LONG, overlong_weight=2.0))
    plain, _ = step(SETTINGS)
    penalty = _overlong(result)
    assert {-1.0, 0.0} < set(penalty.ravel().tolist()), "cut off, short, and in between"
    expected = _of_samples(plain, "reward") + 2.0 * penalty
    np.testing.assert_allclose(_of_samples(result, "reward"), expected, rtol=1e-6)
    np.testing.assert_allclose(
        seen.joined("advantage_NPG")[0], rl_formulas.advantages(expected, "grpo"), rtol=1e-3
    )
    np.testing.assert_allclose(result.metrics["rewards/overlong/mean"], penalty.mean(), rtol=1e-6)


def test_the_penalty_can_be_a_part_by_itself() -> None:
    rewards = {"total": 1.0, "length": 0.25}
    result, seen = step(_with(overlong_buffer=LONG, rewards=rewards))
    plain, _ = step(SETTINGS)
    expected = rl_formulas.advantages(_of_samples(plain, "reward"), "grpo")
    expected += 0.25 * rl_formulas.advantages(_overlong(result), "grpo")
    np.testing.assert_allclose(seen.joined("advantage_NPG")[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "token_mean", "dr_grpo", "gspo"])
def test_what_was_cut_off_has_no_weight_and_keeps_its_place_in_the_group(kind: str) -> None:
    plain, whole = step(_with(loss=kind))
    result, seen = step(_with(loss=kind, mask_truncated=True))
    cut = completions((1, 4, 5)).truncated
    assert cut.any() and not cut.all(-1).any()
    weight, before = (found.joined("weight_NPGC") for found in (seen, whole))
    assert (weight[cut] == 0).all() and (before[cut] > 0).any()
    if kind == "token_mean":  # its tokens leave the mean
        np.testing.assert_allclose(weight.sum(), 1, rtol=1e-6)
    else:  # its row stays in the mean over rows, as a row without tokens does
        np.testing.assert_array_equal(weight[~cut], before[~cut])
    np.testing.assert_array_equal(seen.joined("advantage_NPG"), whole.joined("advantage_NPG"))
    assert result.completions == plain.completions
    assert (seen.joined("advantage_NPG")[cut] != 0).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {"fomat": 1.0}}, "rewards has 'fomat'; the parts are total, format"),
        ({"rewards": {"format": 0.0}}, "rewards.format is 0.0; a weight must be above 0"),
        ({"rewards": {"length": 1.0}}, "give both or neither"),
        ({"rewards": {"format": 1.0}, "overlong_buffer": 4}, "give both or neither"),
        (
            {"rewards": {"length": 1.0}, "overlong_buffer": 4, "overlong_weight": 2.0},
            "give the weight as rewards.length",
        ),
        ({"overlong_weight": 2.0}, "there is no penalty"),
        ({"overlong_weight": 0.0, "overlong_buffer": 4}, "it must be above 0"),
        ({"overlong_buffer": -1}, "overlong_buffer is -1"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _with(**changes)
