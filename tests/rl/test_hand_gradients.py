"""Values and gradients of every kind, and of their sum, against hand derivations in float64."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.kinds import KlKind, LossKind
from r1re_jax.rl.losses import policy_loss, token_weights
from r1re_jax.rl.objective import LossSettings, objective
from tests.oracles import rl_formulas, rl_gradients
from tests.oracles.enumerated import Setting, log_softmax

KINDS = [kind.value for kind in LossKind]
KL_KINDS = [kind.value for kind in KlKind]
P, G, C, LENGTH = 2, 3, 6, 9
property_test = hypothesis.settings(max_examples=15)
clips = st.sampled_from([(0.2, 0.2), (0.1, 0.4), (0.0, 0.0), (1.0, 4.0)])
seeds = st.integers(0, 2**31)


def batch(seed: int, *, on_policy: bool = False) -> dict[str, np.ndarray]:
    """Ragged rows, some empty, of numbers that fp32 holds exactly."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, (P, G, C)).astype(np.float32).astype(np.float64)
    near = lambda: np.float32(logp + rng.normal(scale=0.4, size=logp.shape)).astype(np.float64)  # noqa: E731
    mask = np.arange(C) < rng.integers(0, C + 1, (P, G))[..., None]
    mask[0, 0, 0] = True
    return {
        "logp": logp,
        "old": logp if on_policy else near(),
        "ref": near(),
        "advantage": np.float32(rng.normal(size=(P, G))).astype(np.float64),
        "mask": mask,
    }


@functools.partial(jax.jit, static_argnames="settings")
def library(logp: jax.Array, rest: dict[str, jax.Array], *, settings: LossSettings) -> tuple:
    return jax.value_and_grad(lambda x: objective(x, **rest, settings=settings)[0])(logp)


def ours(arrays: dict[str, np.ndarray], settings: LossSettings) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient of the library's objective."""
    weight = token_weights(arrays["mask"], kind=settings.kind, length=settings.length)
    rest = {
        "old_logp_PGC": arrays["old"],
        "ref_logp_PGC": arrays["ref"],
        "advantage_PG": arrays["advantage"],
        "mask_PGC": arrays["mask"],
        "weight_PGC": weight,
    }
    value, gradient = library(jnp.asarray(arrays["logp"], jnp.float32), rest, settings=settings)
    return np.asarray(value), np.asarray(gradient)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cispo"])
def test_the_hand_derivations_are_the_slopes_of_the_formulas(kind: str) -> None:
    """cispo has no such formula: its weight is held constant."""
    arrays = batch(3)
    old, advantage, mask = (arrays[n] for n in ("old", "advantage", "mask"))
    more = dict(kind=kind, low=0.1, high=0.4, length=LENGTH)
    formula = lambda x: rl_formulas.policy_loss(x, old, advantage, mask, **more)  # noqa: E731
    np.testing.assert_allclose(
        rl_gradients.policy_gradient(arrays["logp"], old, advantage, mask, **more),
        rl_formulas.numeric_gradient(formula, arrays["logp"]),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_the_hand_derived_kl_is_the_slope_of_the_formula(kl_kind: str) -> None:
    arrays = batch(4)
    logp, ref, old, mask = (arrays[n] for n in ("logp", "ref", "old", "mask"))
    formula = lambda x: rl_formulas.kl_loss(x, ref, mask, kind=kl_kind, old=old)  # noqa: E731
    value, gradient = rl_gradients.objective_kl(
        logp, ref, old, mask, kl_kind=kl_kind, kind="token_mean"
    )
    np.testing.assert_allclose(value, formula(logp), rtol=1e-12)
    expected = rl_formulas.numeric_gradient(formula, logp)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(seed=seeds, clip=clips, on_policy=st.booleans())
def test_policy_loss_and_gradient(
    kind: str, seed: int, clip: tuple[float, float], on_policy: bool
) -> None:
    arrays = batch(seed, on_policy=on_policy)
    low, high = clip
    length = LENGTH if kind == "dr_grpo" else None
    settings = LossSettings(
        kind=kind, clip_low=low, clip_high=high, length=length, kl_coefficient=0.0
    )
    value, gradient = ours(arrays, settings)
    rows = [arrays[n] for n in ("logp", "old", "advantage", "mask")]
    more = dict(kind=kind, low=low, high=high, length=length)
    np.testing.assert_allclose(value, rl_formulas.policy_loss(*rows, **more), rtol=1e-5, atol=1e-6)
    expected = rl_gradients.policy_gradient(*rows, **more)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kl_kind", KL_KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_objective_with_every_pair_of_loss_and_kl(kind: str, kl_kind: str, on_policy: bool) -> None:
    """Both terms have the weights of the loss kind; the gradient is the sum of both by hand."""
    arrays, beta = batch(11, on_policy=on_policy), 0.3
    length = LENGTH if kind == "dr_grpo" else None
    settings = LossSettings(
        kind=kind, clip_high=0.4, length=length, kl_coefficient=beta, kl_kind=kl_kind
    )
    value, gradient = ours(arrays, settings)
    logp, old, ref, mask = (arrays[n] for n in ("logp", "old", "ref", "mask"))
    more = dict(kind=kind, high=0.4, length=length)
    kl, kl_gradient = rl_gradients.objective_kl(
        logp, ref, old, mask, kl_kind=kl_kind, kind=kind, length=length
    )
    policy = rl_formulas.policy_loss(logp, old, arrays["advantage"], mask, **more)
    slope = rl_gradients.policy_gradient(logp, old, arrays["advantage"], mask, **more)
    np.testing.assert_allclose(value, policy + beta * kl, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope + beta * kl_gradient, rtol=1e-5, atol=1e-7)


# From the loss to the parameters: a table of logits, so that d log π(v)/dθ = e_v − π.

SETTING = Setting(vocabulary=3, limit=3, stop=0)


def drawn_rows(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Policy and the policy before it, some sequences' indices, and their advantages."""
    rng = np.random.default_rng(seed)
    old = SETTING.table(seed)
    theta = old + rng.normal(scale=0.4, size=old.shape)
    return theta, old, rng.integers(0, len(SETTING.length), 24), rng.normal(size=24)


def through_the_table(
    theta: np.ndarray, old: np.ndarray, rows: np.ndarray, **more: object
) -> tuple:
    """Gradient in θ of the library's loss, by autodiff all the way."""
    at = (SETTING.prefix[rows], SETTING.sequence[rows])
    old_logp, mask = SETTING.token_logp(old)[rows], SETTING.mask[rows]
    advantage = more.pop("advantage")

    def loss(theta: jax.Array) -> jax.Array:
        return policy_loss(jax.nn.log_softmax(theta)[at], old_logp, advantage, mask, **more)[0]

    return np.asarray(jax.grad(loss)(jnp.asarray(theta, jnp.float32)))


def score(theta: np.ndarray, row: int, t: int) -> np.ndarray:
    """d log π(y_t | prefix) / dθ: one row of the table."""
    out = np.zeros(theta.shape)
    at = SETTING.prefix[row, t]
    out[at] = -np.exp(log_softmax(theta)[at])
    out[at, SETTING.sequence[row, t]] += 1
    return out


@pytest.mark.parametrize("seed", range(4))
def test_gspo_moves_the_parameters_as_its_paper_says(seed: int) -> None:
    """2507.18071, (10): mean over rows of s·A·(1/|y|) Σ_t ∇log π, for rows that are not clipped."""
    theta, old, rows, advantage = drawn_rows(seed)
    logp, old_logp = SETTING.token_logp(theta), SETTING.token_logp(old)
    expected, clipped = np.zeros(theta.shape), 0
    for row, a in zip(rows, advantage, strict=True):
        n = SETTING.length[row]
        s = np.exp((logp[row] - old_logp[row])[:n].sum() / n)
        if (a > 0 and s > 1.05) or (a < 0 and s < 0.9):
            clipped += 1
            continue
        nablas = sum(score(theta, row, t) for t in range(n))
        expected -= s * a * nablas / n / len(rows)
    assert 0 < clipped < len(rows)
    clip = {"clip_low": 0.1, "clip_high": 0.05}
    got = through_the_table(theta, old, rows, advantage=advantage, kind="gspo", **clip)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_cispo_moves_the_parameters_as_its_paper_says(seed: int) -> None:
    """2506.13585, (4): Σ sg(clip(r))·A·∇log π / Σ|o|; every token has a say, clipped or not."""
    theta, old, rows, advantage = drawn_rows(seed)
    ratio = np.exp(SETTING.token_logp(theta) - SETTING.token_logp(old))
    expected, clipped = np.zeros(theta.shape), 0
    for row, a in zip(rows, advantage, strict=True):
        for t in range(SETTING.length[row]):
            weight = min(max(ratio[row, t], 0.9), 1.05)
            clipped += weight != ratio[row, t]
            expected -= weight * a * score(theta, row, t) / SETTING.length[rows].sum()
    assert clipped
    clip = {"clip_low": 0.1, "clip_high": 0.05}
    got = through_the_table(theta, old, rows, advantage=advantage, kind="cispo", **clip)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
