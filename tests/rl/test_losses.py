"""Policy losses against NumPy float64: values, gradients, clip, masks, micro-batches."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.kinds import LossKind
from r1re_jax.rl.losses import policy_loss, token_policy_loss, token_weights
from tests.oracles import rl_formulas

KINDS = [kind.value for kind in LossKind]
PPO_KINDS = ["grpo", "token_mean", "bnpo", "dr_grpo"]
P, G, C = 2, 3, 5
property_test = hypothesis.settings(max_examples=25)

# Compiled once per shape and kind: op by op, the property tests would take minutes.
STATIC = ("kind", "length")
jitted_loss = jax.jit(policy_loss, static_argnames=STATIC)
jitted_token_loss = jax.jit(token_policy_loss, static_argnames="kind")


@functools.partial(jax.jit, static_argnames=STATIC)
def jitted_value_and_grad(
    logp: jax.Array, *rest: jax.Array, **more: object
) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda x: policy_loss(x, *rest, **more)[0])(logp)


def batch(seed: int, *, empty_row: bool = True) -> tuple[np.ndarray, ...]:
    """Log-probabilities whose ratios lie on both sides of both clips; ragged rows, one empty."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, (P, G, C))
    old = logp + rng.normal(scale=0.4, size=logp.shape)
    advantage = rng.normal(size=(P, G))
    length = rng.integers(1, C + 1, (P, G))
    if empty_row:
        length[rng.integers(P), rng.integers(G)] = 0
    return logp, old, advantage, np.arange(C) < length[..., None]


def value_and_gradient(
    logp: np.ndarray, old: np.ndarray, advantage: np.ndarray, mask: np.ndarray, **more: object
) -> tuple[np.ndarray, np.ndarray]:
    value, gradient = jitted_value_and_grad(
        jnp.asarray(logp, jnp.float32), old, advantage, mask, **more
    )
    return np.asarray(value), np.asarray(gradient)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(
    seed=st.integers(0, 2**31),
    clip=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 4.0), (0.1, 0.5)]),
)
def test_value_agrees_with_the_formula(kind: str, seed: int, clip: tuple[float, float]) -> None:
    arrays = batch(seed)
    low, high = clip
    got, aux = jitted_loss(*arrays, kind=kind, clip_low=low, clip_high=high)
    assert got.dtype == jnp.float32
    assert got.shape == ()
    assert all(value.shape == () for value in aux.values())
    expected = rl_formulas.policy_loss(*arrays, kind=kind, low=low, high=high)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*PPO_KINDS, "gspo"])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_agrees_with_finite_differences(kind: str, seed: int) -> None:
    logp, old, advantage, mask = batch(seed)
    _, gradient = value_and_gradient(logp, old, advantage, mask, kind=kind)
    expected = rl_formulas.numeric_gradient(
        lambda x: rl_formulas.policy_loss(x, old, advantage, mask, kind=kind), logp
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_kind_is_the_policy_gradient(kind: str) -> None:
    """With old = logp every kind's gradient is −A times the token's weight, whatever the clip."""
    logp, _, advantage, mask = batch(0)
    _, gradient = value_and_gradient(logp, logp, advantage, mask, kind=kind)
    weight = np.asarray(token_weights(mask, kind=kind))
    np.testing.assert_allclose(gradient, -advantage[..., None] * weight, rtol=1e-5)


@pytest.mark.parametrize("kind", PPO_KINDS)
def test_old_logp_and_advantage_carry_no_gradient(kind: str) -> None:
    arrays = [jnp.asarray(x, jnp.float32) for x in batch(0)[:3]]
    mask = batch(0)[3]
    gradients = jax.grad(lambda *xs: policy_loss(*xs, mask, kind=kind)[0], argnums=(1, 2))(*arrays)
    assert all((np.asarray(g) == 0).all() for g in gradients)
    # so that old = logp in one expression is on policy, and not a ratio that is constantly one
    logp, advantage = arrays[0], arrays[2]
    gradient = jax.grad(lambda x: policy_loss(x, x, advantage, mask, kind=kind)[0])(logp)
    assert (np.asarray(gradient)[mask] != 0).all()


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (2.0, 1.5, -1.2 * 2, 0.0, "clip_high"),  # good and already likelier: no more of it
        (2.0, 0.5, -0.5 * 2, -0.5 * 2, None),  # good but less likely: full pull back
        (-2.0, 1.5, 1.5 * 2, 1.5 * 2, None),  # bad and likelier: full push down
        (-2.0, 0.5, 0.8 * 2, 0.0, "clip_low"),  # bad and already less likely: enough
    ],
)
@pytest.mark.parametrize("kind", [*PPO_KINDS, "gspo"])
def test_four_quadrants_of_the_clip(
    kind: str, advantage: float, ratio: float, loss: float, gradient: float, clipped: str | None
) -> None:
    old = np.full((1, 1, 1), -1.0)
    logp = old + np.log(ratio)
    a, mask = np.full((1, 1), advantage), np.ones((1, 1, 1))
    value, slope = value_and_gradient(logp, old, a, mask, kind=kind)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(slope.item(), gradient, rtol=1e-5)
    _, aux = policy_loss(logp, old, a, mask, kind=kind)
    for name in ("clip_low", "clip_high"):
        assert aux[name] == (name == clipped)
    np.testing.assert_allclose(aux["ratio"], ratio, rtol=1e-5)
    np.testing.assert_allclose(aux["old_kl"], ratio - 1 - np.log(ratio), rtol=1e-4)


@pytest.mark.parametrize("kind", [*PPO_KINDS, "gspo"])
def test_asymmetric_clip(kind: str) -> None:
    old, mask = np.zeros((1, 2, 1)), np.ones((1, 2, 1))
    logp, advantage = np.log([[[3.0], [0.2]]]), np.array([[1.0, -1.0]])
    got, aux = policy_loss(logp, old, advantage, mask, kind=kind, clip_low=0.5, clip_high=1.0)
    np.testing.assert_allclose(got, (-2.0 + 0.5) / 2, rtol=1e-5)
    assert (aux["clip_low"], aux["clip_high"]) == (0.5, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_weight_is_a_constant(seed: int) -> None:
    """The gradient is −clip(ratio)·A/tokens everywhere: the clip switches no token off."""
    logp, old, advantage, mask = batch(seed)
    _, gradient = value_and_gradient(logp, old, advantage, mask, kind="cispo")
    weight = np.clip(np.exp(logp - old), 0.8, 1.2) / mask.sum()
    np.testing.assert_allclose(
        gradient, np.where(mask, -weight * advantage[..., None], 0), rtol=1e-5
    )
    assert (gradient[mask] != 0).all()


def test_cispo_reports_its_clip_whatever_the_sign() -> None:
    old, mask = np.zeros((1, 4, 1)), np.ones((1, 4, 1))
    logp = np.log([[[2.0], [0.5], [2.0], [0.5]]])
    _, aux = policy_loss(logp, old, np.array([[1.0, 1.0, -1.0, -1.0]]), mask, kind="cispo")
    assert (aux["clip_low"], aux["clip_high"]) == (0.5, 0.5)


def test_gspo_gradient_by_hand() -> None:
    """d/dlogp_t of −s·A/rows is −s·A/(rows·tokens): the same for each token of an unclipped row."""
    logp, old, advantage, mask = batch(1)
    tokens = np.maximum(mask.sum(-1), 1)
    s = np.exp(np.where(mask, logp - old, 0).sum(-1) / tokens)
    # The first prompt's rows have moved the way their advantage asks, the second's the other way.
    advantage = np.abs(advantage) * np.sign(s - 1) * [[1], [-1]]
    clip = {"clip_low": 0.01, "clip_high": 0.01}
    _, gradient = value_and_gradient(logp, old, advantage, mask, kind="gspo", **clip)
    clipped = (np.abs(s - 1) > 0.01) & [[True], [False]]
    assert clipped.any()
    row = np.where(clipped, 0, -s * advantage / (P * G * tokens))
    np.testing.assert_allclose(gradient, np.where(mask, row[..., None], 0), rtol=1e-5, atol=1e-8)


def test_denominators_by_hand() -> None:
    """Rows of 1, 3 and 0 tokens, ratio 1, advantages 1, 2 and 5."""
    zeros = np.zeros((1, 3, 4))
    mask = np.arange(4) < np.array([1, 3, 0])[:, None]
    advantage = np.array([[1.0, 2.0, 5.0]])
    for kind, expected in {
        "grpo": -(1 + 2 + 0) / 3,
        "gspo": -(1 + 2 + 0) / 3,
        "token_mean": -(1 + 3 * 2) / 4,
        "bnpo": -(1 + 3 * 2) / 4,
        "dr_grpo": -(1 + 3 * 2) / (3 * 4),
        "cispo": 0.0,  # its value is A·logp, and logp is 0 here
    }.items():
        got, _ = policy_loss(zeros, zeros, advantage, mask[None], kind=kind)
        np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=kind)
    got, _ = policy_loss(zeros, zeros, advantage, mask[None], kind="dr_grpo", length=10)
    np.testing.assert_allclose(got, -(1 + 3 * 2) / (3 * 10), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_under_the_mask_is_read(kind: str, poison: float) -> None:
    logp, old, advantage, mask = batch(2)
    clean = value_and_gradient(logp, old, advantage, mask, kind=kind)
    dirty = [np.where(mask, x, poison) for x in (logp, old)]
    empty = mask.any(-1)
    advantage = np.where(empty, advantage, poison)  # nor the advantage of a row without tokens
    got = value_and_gradient(*dirty, advantage, mask, kind=kind)
    np.testing.assert_array_equal(got[0], clean[0])
    np.testing.assert_array_equal(got[1], clean[1])
    assert (got[1][~mask] == 0).all()
    _, aux = policy_loss(*dirty, advantage, mask, kind=kind)
    assert all(np.isfinite(value) for value in aux.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
def test_masks_of_any_dtype(kind: str, dtype: type) -> None:
    logp, old, advantage, mask = batch(3)
    expected = value_and_gradient(logp, old, advantage, mask, kind=kind)
    got = value_and_gradient(logp, old, advantage, mask.astype(dtype), kind=kind)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_need_not_be_prefixes(kind: str) -> None:
    logp, old, advantage, _ = batch(4)
    mask = np.random.default_rng(4).random(logp.shape) < 0.5
    got, _ = policy_loss(logp, old, advantage, mask, kind=kind)
    expected = rl_formulas.policy_loss(logp, old, advantage, mask, kind=kind)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_tokens_is_zero(kind: str) -> None:
    nothing = np.full((P, G, C), np.nan)
    value, gradient = value_and_gradient(
        nothing, nothing, np.full((P, G), np.nan), np.zeros((P, G, C)), kind=kind
    )
    assert value == 0
    assert (gradient == 0).all()
    _, aux = policy_loss(nothing, nothing, np.ones((P, G)), np.zeros((P, G, C)), kind=kind)
    assert all(value == 0 for value in aux.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unmasked_nan_is_not_hidden(kind: str) -> None:
    logp, old, advantage, mask = batch(5, empty_row=False)
    logp[0, 0, 0] = np.nan
    for a in (advantage, np.zeros_like(advantage)):
        assert np.isnan(policy_loss(logp, old, a, mask, kind=kind)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_an_overflowing_ratio_that_is_not_used_gives_no_nan(kind: str, advantage: float) -> None:
    """exp(200) is infinite in fp32; clipped, or times an advantage of 0, it must not matter."""
    old, mask = np.full((1, 1, 2), -201.0), np.ones((1, 1, 2))
    value, gradient = value_and_gradient(
        old + 200, old, np.full((1, 1), advantage), mask, kind=kind
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_more_leading_axes_are_more_rows(kind: str) -> None:
    logp, old, advantage, mask = batch(6)
    expected = policy_loss(logp, old, advantage, mask, kind=kind)[0]
    got = policy_loss(logp[None], old[None], advantage[None], mask[None], kind=kind)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_inputs_are_computed_in_fp32(kind: str) -> None:
    logp, old, advantage, mask = batch(7)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (logp, old)]
    got, _ = policy_loss(*rounded, advantage, mask, kind=kind)
    expected, _ = policy_loss(*(x.astype(jnp.float32) for x in rounded), advantage, mask, kind=kind)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@hypothesis.given(
    seed=st.integers(0, 2**31), cuts=st.sampled_from([(1,), (3,), (2, 3), (1, 2, 3, 4, 5)])
)
def test_parts_of_any_size_add_up_to_the_whole(kind: str, seed: int, cuts: tuple) -> None:
    """Σ over micro-batches of weight · token loss, rows shuffled, equals the loss of the batch."""
    logp, old, advantage, mask = batch(seed)
    whole, _ = jitted_loss(logp, old, advantage, mask, kind=kind)
    rows = P * G
    order = np.random.default_rng(seed).permutation(rows)
    weight = np.asarray(token_weights(mask, kind=kind)).reshape(rows, C)[order]
    flat = [x.reshape(rows, *x.shape[2:])[order] for x in (logp, old, advantage, mask)]
    bounds = [0, *cuts, rows]
    total = 0.0
    for start, end in zip(bounds, bounds[1:], strict=False):
        token_loss, _ = jitted_token_loss(*(x[start:end] for x in flat), kind=kind)
        total += float(np.sum(token_loss * weight[start:end]))
    np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_the_rows_changes_nothing_but_dr_grpo_without_length(kind: str) -> None:
    arrays = batch(8)
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 4)])  # noqa: E731
    logp, old, advantage, mask = arrays
    length = C if kind == "dr_grpo" else None
    expected, _ = policy_loss(*arrays, kind=kind)
    got, _ = policy_loss(pad(logp), pad(old), advantage, pad(mask), kind=kind, length=length)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_weights_of_the_mean_kinds_sum_to_the_share_of_rows_with_tokens() -> None:
    mask = batch(9)[3]
    rows = mask.any(-1).mean()
    np.testing.assert_allclose(token_weights(mask, kind="grpo").sum(), rows, rtol=1e-6)
    np.testing.assert_allclose(token_weights(mask, kind="token_mean").sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(token_weights(mask, kind="dr_grpo").sum(), mask.mean(), rtol=1e-6)


def test_enum_and_jit() -> None:
    arrays = batch(10)
    got, aux = jitted_loss(*arrays, kind=LossKind.GSPO)
    expected, expected_aux = policy_loss(*arrays, kind="gspo")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for name, value in expected_aux.items():
        np.testing.assert_allclose(aux[name], value, rtol=1e-6)


def test_bad_arguments_are_refused() -> None:
    logp, old, advantage, mask = batch(0)
    with pytest.raises(ValueError, match="'ppo'.*'grpo', 'token_mean', 'bnpo'.*'cispo'"):
        policy_loss(logp, old, advantage, mask, kind="ppo")
    with pytest.raises(ValueError, match="'ppo'"):
        token_weights(mask, kind="ppo")
    with pytest.raises(ValueError, match=r"old_logp has shape \(2, 3, 4\)"):
        policy_loss(logp, old[..., :-1], advantage, mask)
    with pytest.raises(ValueError, match=r"advantage has shape \(2, 3, 5\); expected \(2, 3\)"):
        policy_loss(logp, old, logp, mask)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5\)"):
        policy_loss(logp, old, advantage, mask[0])
    with pytest.raises(ValueError, match="length is 0"):
        policy_loss(logp, old, advantage, mask, kind="dr_grpo", length=0)
    with pytest.raises(ValueError, match="scalar"):
        token_weights(True)
