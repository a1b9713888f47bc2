"""KL estimators: values, and what their gradients are in expectation, by exact enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.rl.kinds import KlKind
from r1re_jax.rl.kl import kl_loss, token_kl
from tests.oracles import rl_formulas

KINDS = [kind.value for kind in KlKind]
V, C = 4, 2  # the enumerated policy: all sequences of two tokens out of four
SEQUENCES = np.array(list(itertools.product(range(V), repeat=C)))


def batch(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, (2, 3, 5))
    ref, old = (logp + rng.normal(scale=0.5, size=logp.shape) for _ in range(2))
    return logp, ref, old, np.arange(5) < np.array([[5, 0, 3], [1, 2, 4]])[..., None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("off_policy", [False, True])
def test_value_and_gradient_agree_with_the_formula(kind: str, seed: int, off_policy: bool) -> None:
    logp, ref, old, mask = batch(seed)
    old = old if off_policy else None
    loss = functools.partial(kl_loss, mask_PGC=mask, kind=kind, old_logp_PGC=old)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logp, jnp.float32), ref)
    assert value.dtype == jnp.float32
    constant = logp if old is None else old
    formula = lambda x: rl_formulas.kl_loss(x, ref, mask, kind=kind, old=constant)  # noqa: E731
    np.testing.assert_allclose(value, formula(logp), rtol=1e-4)
    expected = rl_formulas.numeric_gradient(formula, logp)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_k3_plus_on_policy_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    logp, ref, _, mask = batch(0)
    both = {
        kind: jax.value_and_grad(functools.partial(kl_loss, mask_PGC=mask, kind=kind))(
            jnp.asarray(logp, jnp.float32), ref
        )
        for kind in KINDS
    }
    np.testing.assert_allclose(both["k3_plus"][0], both["k3"][0], rtol=1e-6)
    np.testing.assert_allclose(both["k3_plus"][1], both["k2"][1], rtol=1e-4, atol=1e-7)
    assert not np.allclose(both["k3_plus"][1], both["k3"][1], rtol=0.1)


# The enumerated policy. θ has one row of logits for the first token, and one for the second after
# each first token: [1 + V, V]. Prefix distributions are held fixed: it is the gradient "at the
# sampled prefixes" that a token-wise loss can have.


def table(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1 + V, V)), jnp.float32)


def sequence_logp(theta: jax.Array) -> jax.Array:
    """[V², 2] log-probabilities of both tokens of every sequence."""
    logp = jax.nn.log_softmax(theta, -1)
    first, second = SEQUENCES[:, 0], SEQUENCES[:, 1]
    return jnp.stack([logp[0, first], logp[1 + first, second]], -1)


def prefix_kl(theta: jax.Array, other: jax.Array, drawn: jax.Array, *, reverse: bool) -> jax.Array:
    """Σ over prefixes of P(prefix | drawn) · KL: of theta to other, or reversed, in closed form."""
    logp, logq = jax.nn.log_softmax(theta, -1), jax.nn.log_softmax(other, -1)
    if reverse:
        logp, logq = logq, logp
    kl = (jnp.exp(logp) * (logp - logq)).sum(-1)
    reached = jnp.concatenate([jnp.ones(1), jax.nn.softmax(drawn[0])])
    return jnp.sum(jax.lax.stop_gradient(reached) * kl)


def expected_kl_term(
    theta: jax.Array, reference: jax.Array, drawn: jax.Array, *, kind: str, pass_old: bool
) -> jax.Array:
    """E over sequences drawn from `drawn` of Σ_t estimator, differentiable in theta."""
    logp, ref, old = (sequence_logp(x) for x in (theta, reference, drawn))
    probability = jax.lax.stop_gradient(jnp.exp(old.sum(-1)))

    def one_row(logp: jax.Array, ref: jax.Array, old: jax.Array) -> jax.Array:
        old_logp = old[None, None] if pass_old else None
        row = (logp[None, None], ref[None, None], jnp.ones((1, 1, C)))
        return C * kl_loss(*row, kind=kind, old_logp_PGC=old_logp)

    return jnp.sum(probability * jax.vmap(one_row)(logp, ref, old))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["k2", "k3_plus"])
def test_on_policy_gradient_is_that_of_kl_policy_to_reference(kind: str, seed: int) -> None:
    theta, reference = table(seed), table(seed + 100)
    gradient = jax.grad(expected_kl_term)(theta, reference, theta, kind=kind, pass_old=False)
    expected = jax.grad(prefix_kl)(theta, reference, theta, reverse=False)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3", "k3_plus"])
def test_on_policy_value_is_the_kl(kind: str) -> None:
    theta, reference = table(1), table(2)
    got = expected_kl_term(theta, reference, theta, kind=kind, pass_old=False)
    np.testing.assert_allclose(got, prefix_kl(theta, reference, theta, reverse=False), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_k3_plus_is_unbiased_in_value_and_gradient(seed: int) -> None:
    theta, reference, drawn = table(seed), table(seed + 100), table(seed + 200)
    got = jax.value_and_grad(expected_kl_term)(
        theta, reference, drawn, kind="k3_plus", pass_old=True
    )
    expected = jax.value_and_grad(prefix_kl)(theta, reference, drawn, reverse=False)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-6)


def test_trap_k1_as_a_loss_has_zero_expected_gradient() -> None:
    theta, reference = table(1), table(2)
    gradient = jax.grad(expected_kl_term)(theta, reference, theta, kind="k1", pass_old=False)
    np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-6)


def test_trap_k3_as_a_loss_has_the_gradient_of_the_other_direction() -> None:
    theta, reference = table(1), table(2)
    gradient = jax.grad(expected_kl_term)(theta, reference, theta, kind="k3", pass_old=False)
    # Exact for the first token; for the second, KL(reference‖policy) where the *policy* gets to.
    expected = jax.grad(prefix_kl)(theta, reference, theta, reverse=True)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    wanted = jax.grad(prefix_kl)(theta, reference, theta, reverse=False)
    assert not np.allclose(gradient, wanted, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_old_carry_no_gradient(kind: str) -> None:
    logp, ref, old, mask = (jnp.asarray(x) for x in batch(0))
    gradients = jax.grad(
        lambda r, o: kl_loss(logp, r, mask, kind=kind, old_logp_PGC=o), argnums=(0, 1)
    )(jnp.asarray(ref, jnp.float32), jnp.asarray(old, jnp.float32))
    assert all((np.asarray(g) == 0).all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_under_the_mask_is_read(kind: str, poison: float) -> None:
    logp, ref, old, mask = batch(0)

    def both(*arrays: np.ndarray) -> tuple[jax.Array, jax.Array]:
        logp, ref, old = (jnp.asarray(x, jnp.float32) for x in arrays)
        loss = lambda x: kl_loss(x, ref, mask, kind=kind, old_logp_PGC=old)  # noqa: E731
        return jax.value_and_grad(loss)(logp)

    clean = both(logp, ref, old)
    dirty = both(*(np.where(mask, x, poison) for x in (logp, ref, old)))
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    assert (np.asarray(dirty[1])[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_is_zero(kind: str) -> None:
    nothing = np.full((1, 2, 3), np.nan)
    value, gradient = jax.value_and_grad(
        lambda x: kl_loss(x, nothing, np.zeros((1, 2, 3)), kind=kind)
    )(jnp.asarray(nothing, jnp.float32))
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_masks_of_any_dtype(kind: str, dtype: type) -> None:
    logp, ref, _, mask = batch(1)
    np.testing.assert_array_equal(
        kl_loss(logp, ref, mask.astype(dtype), kind=kind), kl_loss(logp, ref, mask, kind=kind)
    )


def test_k3_keeps_its_digits_where_the_policies_nearly_agree() -> None:
    """exp(d) − d − 1 in fp32 is 0 or negative noise at d = 1e-4; the true value is d²/2."""
    logp = np.zeros((1, 1, 1))
    for sign in (1, -1):
        got = token_kl(logp, logp + sign * 1e-4, np.ones((1, 1, 1)), kind="k3")
        assert got.item() > 0
        np.testing.assert_allclose(got.item(), 5e-9, rtol=2e-3)


def test_a_ratio_beyond_fp32_leaves_k3_plus_finite() -> None:
    """Policy and reference agree on tokens that the sampler held for all but impossible."""
    logp, old = np.full((1, 1, 2), -1.0), np.full((1, 1, 2), -200.0)
    mask = np.ones((1, 1, 2))
    for ref, value in ((logp, 0.0), (logp - 1, np.exp(80) * np.exp(-1))):
        got, slope = jax.value_and_grad(kl_loss)(logp, ref, mask, kind="k3_plus", old_logp_PGC=old)
        np.testing.assert_allclose(got, value, rtol=1e-5)
        assert np.isfinite(slope).all()


def test_enum_jit_and_leading_axes() -> None:
    logp, ref, _, mask = batch(2)
    jitted = jax.jit(lambda *xs: kl_loss(*xs, kind=KlKind.K3_PLUS))
    expected = kl_loss(logp, ref, mask, kind="k3_plus")
    np.testing.assert_allclose(jitted(logp, ref, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(jitted(logp[None], ref[None], mask[None]), expected, rtol=1e-6)


def test_bad_arguments_are_refused() -> None:
    logp, ref, old, mask = batch(0)
    with pytest.raises(ValueError, match="'k4'.*'k1', 'k2', 'k3', 'k3_plus'"):
        kl_loss(logp, ref, mask, kind="k4")
    with pytest.raises(ValueError, match="ref_logp has shape"):
        kl_loss(logp, ref[:1], mask, kind="k3")
    with pytest.raises(ValueError, match="mask has shape"):
        kl_loss(logp, ref, mask[0], kind="k3")
    with pytest.raises(ValueError, match="old_logp has shape"):
        kl_loss(logp, ref, mask, kind="k3_plus", old_logp_PGC=old[0])
