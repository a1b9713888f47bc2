"""Losses, gradients and advantages agree with the code of TRL's own trainers.

Runs where R1RE_TRL_PYTHON names an interpreter with TRL (CONTRIBUTING.md); figures of one such run
are in docs/results/peer_parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.rl.advantages import group_advantages
from r1re_jax.rl.losses import policy_loss
from r1re_jax.rl.objective import LossSettings, objective
from tests.oracles import enumerated
from tests.parity import trl_cases

# What is asked beside the loss cases: where the two differ on purpose.
NAN, OVERFLOW, LOWER, SEQUENCE = "nan", "overflow", "lower", "sequence"
EQUAL = np.full((1, 7), 0.1)  # whose mean is not 0.1 in fp32
UNSCORED = np.array([[np.nan, 1.0, 2.0, 3.0]])
HUGE = np.array([[1e30, 0.0, 1e30, 0.0]])
KL_CASES = {
    "k3": {"use_bias_correction_kl": False},
    "k3_plus": {"use_bias_correction_kl": True},
    SEQUENCE: {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
}


def one_row(logp: float, old: float, advantage: float) -> dict[str, np.ndarray]:
    """Rows of two tokens, the second masked; as many rows as a group has."""
    rows = trl_cases.GROUP
    return {
        "logp": np.tile(np.array([logp, -1.0], np.float32), (rows, 1)),
        "old": np.tile(np.array([old, -1.0], np.float32), (rows, 1)),
        "advantage": np.full(rows, advantage, np.float32),
        "mask": np.tile(np.array([True, False]), (rows, 1)),
    }


def question(arrays: dict, **settings: object) -> tuple[dict, dict]:
    """Return a case for `trl_side.py` that is not among `loss_cases`, and its arrays."""
    base = {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.2}
    case = dict(what="loss", dtype="float32", parts=1, group=trl_cases.GROUP)
    return case | {"settings": base | settings}, arrays


def special() -> dict[str, tuple[dict, dict]]:
    """Return what is asked besides `loss_cases`, by name."""
    dirty = one_row(-1.0, -1.0, 1.0)
    dirty["logp"][:, 1] = np.nan
    asked = {
        NAN: question(dirty),
        OVERFLOW: question(one_row(-1.0, -201.0, 0.0)),
        LOWER: question(one_row(-2.0, -1.0, 1.0), loss_type="cispo", epsilon_high=1.2),
    }
    rows = enumerated_rows()
    for name, settings in KL_CASES.items():
        asked[f"enumerated {name}"] = question(rows, **settings, beta=1.0)
    for name, reward in {"equal": EQUAL, "unscored": UNSCORED, "huge": HUGE}.items():
        case = dict(what="advantage", trainer="grpo", settings={"scale_rewards": "group"})
        asked[name] = (case, {"reward": reward})
    return asked


@pytest.fixture(scope="module")
def peer() -> dict[str, np.ndarray]:
    """TRL's answers to everything, from one process."""
    reason = trl_cases.missing_trl()
    if reason:
        pytest.skip(reason)
    asked = special()
    return trl_cases.ask_all(
        {n: c for n, (c, _) in asked.items()}, {n: a for n, (_, a) in asked.items()}
    )


@pytest.mark.parametrize(("kind", "kl"), trl_cases.VARIANTS)
def test_loss_and_gradient_are_those_of_trl(peer: dict, kind: str, kl: str) -> None:
    """On and off policy, ragged and empty rows, two clips, whole and in micro-batches."""
    for dtype, value, gradient in trl_cases.loss_differences(peer, kind, kl):
        assert value < 1e-6, dtype
        assert gradient < 1e-6, dtype


@pytest.mark.parametrize("kind", trl_cases.ADVANTAGES)
def test_advantages_are_those_of_trl(peer: dict, kind: str) -> None:
    assert trl_cases.advantage_difference(peer, kind) < 2e-6


def test_the_cases_reach_both_clips_and_empty_rows() -> None:
    """Parity of cases that never clip would prove little."""
    for (kind, _), cases in trl_cases.loss_cases().items():
        for case in cases:
            arrays = case.arrays
            assert (arrays["mask"].sum(-1) == 0).any()
            assert (arrays["mask"].sum(-1) == arrays["mask"].shape[1]).any()
            ratio = np.exp(arrays["logp"] - arrays["old"])[arrays["mask"]]
            if kind != "cispo" and (ratio != 1).any():
                assert (ratio < 1 - case.low).any()
                assert (ratio > 1 + case.high).any()


# Where the two differ, and who is right.


def test_nan_under_the_mask_stays_there_and_spoils_trls_loss(peer: dict) -> None:
    """TRL multiplies by the mask, and 0 · NaN is NaN; we replace before anything is computed."""
    arrays = special()[NAN][1]
    ours = lambda x: policy_loss(x, arrays["old"], arrays["advantage"], arrays["mask"])[0]  # noqa: E731
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(arrays["logp"]))
    assert value == -1
    assert np.isfinite(gradient).all()
    assert np.isnan(peer[f"{NAN}/loss"])
    assert np.isnan(peer[f"{NAN}/gradient"]).any()


def test_an_unused_overflowing_ratio_is_nan_in_trl_alone(peer: dict) -> None:
    """Advantage 0 times a ratio of exp(200)."""
    arrays = special()[OVERFLOW][1]
    ours = lambda x: policy_loss(x, arrays["old"], arrays["advantage"], arrays["mask"])[0]  # noqa: E731
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(arrays["logp"]))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(arrays["logp"]))
    assert np.isnan(peer[f"{OVERFLOW}/loss"])


def test_only_ours_bounds_the_weight_of_cispo_from_below(peer: dict) -> None:
    """The paper's formula has both bounds, its experiments only the upper; clip_low=1 is TRL's."""
    arrays = special()[LOWER][1]
    names = ("logp", "old", "advantage", "mask")
    for low, weight in ((0.2, 0.8), (1.0, np.exp(-1.0))):
        ours, _ = policy_loss(*(arrays[n] for n in names), kind="cispo", clip_low=low)
        np.testing.assert_allclose(ours, 2 * weight, rtol=1e-6)
    np.testing.assert_allclose(peer[f"{LOWER}/loss"], 2 * np.exp(-1.0), rtol=1e-6)


def test_equal_rewards_give_rounding_noise_in_trl_and_zero_here(peer: dict) -> None:
    np.testing.assert_array_equal(group_advantages(EQUAL), np.zeros((1, 7)))
    noise = np.abs(peer["equal/advantage"]).max()
    assert 0 < noise < 1e-3


def test_a_reward_of_nan_is_left_out_by_trl_and_told_here(peer: dict) -> None:
    """TRL reads it as "could not be scored"; here every completion has a reward."""
    assert np.isnan(group_advantages(UNSCORED)).all()
    np.testing.assert_allclose(peer["unscored/advantage"], [[0, -1, 0, 1]], atol=1e-3)


def test_rewards_whose_squares_overflow_have_no_advantage_in_trl(peer: dict) -> None:
    np.testing.assert_allclose(group_advantages(HUGE), [[0.75**0.5, -(0.75**0.5)] * 2], rtol=1e-6)
    np.testing.assert_array_equal(peer["huge/advantage"], np.zeros((1, 4)))


# The KL term of TRL's three settings, judged by enumeration: all sequences of a small policy are
# the batch, and each row's gradient is weighted with the probability that the row is drawn.

SETTING = enumerated.Setting(vocabulary=4, limit=2, stop=None)


def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of policy, reference and the policy that drew."""
    return tuple(SETTING.table(seed) for seed in (1, 2, 3))


def enumerated_rows() -> dict[str, np.ndarray]:
    """Every sequence once, off policy, with advantage 0."""
    arrays = zip(("logp", "ref", "old"), tables(), strict=True)
    rows = {name: SETTING.token_logp(theta).astype(np.float32) for name, theta in arrays}
    return rows | {"advantage": np.zeros(len(rows["logp"]), np.float32), "mask": SETTING.mask}


def expected_gradient(row_gradient: np.ndarray) -> np.ndarray:
    """Gradient in the logits of the expected sum over tokens, from that of the mean over rows."""
    policy, _, drawn = tables()
    token_gradient = row_gradient * SETTING.mask.size  # rows of full length: 1 / (rows · tokens)
    return SETTING.expected(policy, drawn, token_gradient)


@pytest.mark.parametrize(("name", "right"), [("k3", False), ("k3_plus", True), (SEQUENCE, False)])
def test_of_trls_kl_terms_the_token_weighted_one_is_the_kl(
    peer: dict, name: str, right: bool
) -> None:
    policy, reference, drawn = tables()
    wanted = SETTING.kl_gradient(policy, reference, drawn)
    theirs = expected_gradient(peer[f"enumerated {name}/gradient"])
    worst = np.abs(theirs - wanted).max() / np.abs(wanted).max()
    assert worst < 1e-5 if right else worst > 0.1


def test_our_gspo_weights_the_kl_by_token_and_is_right() -> None:
    rows = enumerated_rows()
    settings = LossSettings(kind="gspo", kl_coefficient=1.0, kl_kind="k3_plus")
    weight = np.full(rows["logp"].shape, 1 / SETTING.mask.size)

    def loss(logp: jax.Array) -> jax.Array:
        names = {f"{name}_PGC": rows[name] for name in ("mask",)}
        names |= {f"{name}_logp_PGC": rows[name] for name in ("old", "ref")}
        return objective(
            logp, **names, advantage_PG=rows["advantage"], weight_PGC=weight, settings=settings
        )[0]

    policy, reference, drawn = tables()
    got = expected_gradient(np.asarray(jax.grad(loss)(jnp.asarray(rows["logp"]))))
    wanted = SETTING.kl_gradient(policy, reference, drawn)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
