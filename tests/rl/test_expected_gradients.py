"""Expected gradients over all sequences of a small policy, against closed forms in float64.

Sequences end with a stop token or at the limit, so lengths vary. The library gives each token's
gradient in its log-probability; what that means for the policy's logits is computed in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.rl.advantages import group_advantages
from r1re_jax.rl.kinds import KlKind
from r1re_jax.rl.kl import kl_loss, token_kl
from r1re_jax.rl.losses import policy_loss, token_weights
from r1re_jax.rl.objective import LossSettings, objective
from tests.oracles.enumerated import Setting, log_softmax

SETTING = Setting(vocabulary=3, limit=3, stop=0)
KINDS = [kind.value for kind in KlKind]
SEEDS = range(3)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def differs(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Off by more than a tenth of the largest entry: a wrong formula, not rounding."""
    return np.abs(got - wanted).max() > 0.1 * np.abs(wanted).max()


def tables(seed: int, *, off_policy: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of policy, reference and the policy that draws."""
    policy, reference = SETTING.table(seed), SETTING.table(seed + 100)
    return policy, reference, SETTING.table(seed + 200) if off_policy else policy


# The oracle itself.


@pytest.mark.parametrize("seed", SEEDS)
def test_the_closed_forms_are_what_autodiff_gives_in_float64(seed: int) -> None:
    policy, reference, drawn = tables(seed, off_policy=True)
    reached = SETTING.reached(drawn)
    with jax.enable_x64(True):
        target, weight = jnp.asarray(log_softmax(reference)), jnp.asarray(reached)

        def kl(theta: jax.Array, *, reverse: bool) -> jax.Array:
            first, second = jax.nn.log_softmax(theta), target
            first, second = (second, first) if reverse else (first, second)
            return weight @ (jnp.exp(first) * (first - second)).sum(-1)

        value, gradient = jax.value_and_grad(kl)(jnp.asarray(policy), reverse=False)
        other = jax.grad(kl)(jnp.asarray(policy), reverse=True)
        assert gradient.dtype == jnp.float64
        exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
        exact(value, SETTING.kl(policy, reference, drawn))
        exact(gradient, SETTING.kl_gradient(policy, reference, drawn))
        exact(other, SETTING.other_kl_gradient(policy, reference, drawn))


def test_the_sequences_are_all_there_are() -> None:
    policy = SETTING.table(0)
    assert len(SETTING.sequence) == 1 + 2 + 4 + 8
    np.testing.assert_allclose(SETTING.probability(policy).sum(), 1, rtol=1e-12)
    counted = np.zeros(len(SETTING.prefixes))
    for s, chance in enumerate(SETTING.probability(policy)):
        np.add.at(counted, SETTING.prefix[s, : SETTING.length[s]], chance)
    np.testing.assert_allclose(counted, SETTING.reached(policy), rtol=1e-12)
    # The score function has mean zero: E Σ_t d log π = 0.
    ones = np.ones(SETTING.mask.shape)
    np.testing.assert_allclose(SETTING.expected(policy, policy, ones), 0, atol=1e-15)


# The KL term.


def kl_expectation(
    policy: np.ndarray, reference: np.ndarray, drawn: np.ndarray, kind: str
) -> tuple[float, np.ndarray]:
    """Expected sum over tokens of the library's estimator, and its expected gradient in logits."""
    logp, ref, old = (SETTING.token_logp(theta) for theta in (policy, reference, drawn))
    rest = dict(kind=kind, old_logp_PGC=old)
    loss = lambda x: kl_loss(x, ref, SETTING.mask, **rest) * SETTING.mask.sum()  # noqa: E731
    gradient = jax.grad(loss)(jnp.asarray(logp, jnp.float32))
    token = np.asarray(token_kl(logp, ref, SETTING.mask, **rest), np.float64)
    value = float(SETTING.probability(drawn) @ token.sum(-1))
    return value, SETTING.expected(policy, drawn, np.asarray(gradient, np.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_estimator_has_the_gradient_derived_by_hand(
    kind: str, off_policy: bool, seed: int
) -> None:
    """At a prefix, tokens drawn from q with gradient f(v) give q·f − (Σ q·f)·π in the logits."""
    policy, reference, drawn = tables(seed, off_policy=off_policy)
    gap = log_softmax(policy) - log_softmax(reference)
    f = {
        "k1": np.ones_like(gap),
        "k2": gap,
        "k3": 1 - np.exp(-gap),
        # ρ·(k3 + k3'): the two halves of the product rule add up to the log-ratio.
        "k3_plus": np.exp(log_softmax(policy) - log_softmax(drawn)) * gap,
    }[kind]
    weighted = np.exp(log_softmax(drawn)) * f
    at_prefix = weighted - weighted.sum(-1, keepdims=True) * np.exp(log_softmax(policy))
    expected = SETTING.reached(drawn)[:, None] * at_prefix
    close(kl_expectation(policy, reference, drawn, kind)[1], expected)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_k3_plus_is_the_kl_in_value_and_gradient(off_policy: bool, seed: int) -> None:
    policy, reference, drawn = tables(seed, off_policy=off_policy)
    value, gradient = kl_expectation(policy, reference, drawn, "k3_plus")
    close(value, SETTING.kl(policy, reference, drawn))
    close(gradient, SETTING.kl_gradient(policy, reference, drawn))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_others_give(seed: int) -> None:
    """As values and as losses, on policy and off, each beside what is wanted."""
    for off_policy in (False, True):
        policy, reference, drawn = three = tables(seed, off_policy=off_policy)
        wanted = SETTING.kl_gradient(*three)
        value, gradient = kl_expectation(*three, "k1")
        # k1 pushes away from the policy that drew; on policy that is no push at all.
        close(gradient, -SETTING.other_kl_gradient(policy, drawn, drawn))
        assert differs(gradient, wanted)
        assert np.isclose(value, SETTING.kl(*three), rtol=1e-4) != off_policy

        value, gradient = kl_expectation(*three, "k2")
        assert differs(gradient, wanted) == off_policy
        assert not np.isclose(value, SETTING.kl(*three), rtol=0.01)

        value, gradient = kl_expectation(*three, "k3")
        assert differs(gradient, wanted)
        assert np.isclose(value, SETTING.kl(*three), rtol=1e-4) != off_policy
        if not off_policy:
            close(gradient, SETTING.other_kl_gradient(policy, reference, drawn))


def test_in_the_objective_only_a_constant_length_keeps_the_kl() -> None:
    """Weighted 1 / (rows · length) the term is the KL; by a row's own length it is not."""
    policy, reference, drawn = three = tables(0, off_policy=True)
    logp, ref, old = (SETTING.token_logp(theta) for theta in three)
    rows = len(logp)
    for kind, exact in (("dr_grpo", True), ("grpo", False)):
        settings = LossSettings(kind=kind, kl_coefficient=0.5)
        weight = np.asarray(token_weights(SETTING.mask, kind=kind))
        rest = dict(old_logp_PGC=old, ref_logp_PGC=ref, advantage_PG=np.zeros(rows))
        rest |= dict(mask_PGC=SETTING.mask, weight_PGC=weight, settings=settings)
        loss = lambda x, rest=rest: objective(x, **rest)[0]  # noqa: E731
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(logp, jnp.float32)), np.float64)
        got = SETTING.expected(policy, drawn, gradient * rows * SETTING.limit / 0.5)
        wanted = SETTING.kl_gradient(*three)
        assert differs(got, wanted) != exact
        if exact:
            close(got, wanted)


# The policy gradient and length.


def reward_gradient(policy: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """d E[reward] / dθ = E[reward · Σ_t d log π]; the policy gradient, exactly."""
    return SETTING.expected(policy, policy, np.broadcast_to(reward[:, None], SETTING.mask.shape))


def row_gradient(policy: np.ndarray, advantage: np.ndarray, kind: str) -> np.ndarray:
    """Expected gradient in logits of the on-policy loss of one row."""
    logp = jnp.asarray(SETTING.token_logp(policy), jnp.float32)
    loss = lambda x, a, m: policy_loss(x[None], x[None], a[None], m[None], kind=kind)[0]  # noqa: E731
    gradient = jax.vmap(jax.grad(loss))(logp, jnp.asarray(advantage), jnp.asarray(SETTING.mask))
    return SETTING.expected(policy, policy, np.asarray(gradient, np.float64))


@pytest.mark.parametrize("baseline", [0.0, 1.7])
@pytest.mark.parametrize("seed", SEEDS)
def test_dr_grpo_follows_the_expected_reward_and_grpo_the_reward_per_token(
    baseline: float, seed: int
) -> None:
    """Dr. GRPO (arXiv 2503.20783), 3.2: a constant denominator, and any baseline drops out."""
    policy = SETTING.table(seed)
    reward = np.random.default_rng(seed).normal(size=len(SETTING.length))
    wanted = -reward_gradient(policy, reward)
    close(SETTING.limit * row_gradient(policy, reward - baseline, "dr_grpo"), wanted)
    for kind in ("grpo", "token_mean"):  # for a single row the same
        biased = row_gradient(policy, reward - baseline, kind)
        close(biased, -reward_gradient(policy, (reward - baseline) / SETTING.length))
        assert differs(SETTING.length.mean() * biased, wanted)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_where_nothing_is_better_grpo_still_changes_the_length(sign: float, seed: int) -> None:
    """Equal advantages: shorter where they are positive, longer where negative."""
    policy = SETTING.table(seed)
    advantage = np.full(len(SETTING.length), sign)
    np.testing.assert_allclose(row_gradient(policy, advantage, "dr_grpo"), 0, atol=1e-7)
    step = -row_gradient(policy, advantage, "grpo")
    change_of_length = (step * reward_gradient(policy, SETTING.length.astype(float))).sum()
    assert sign * change_of_length < -1e-3


@pytest.mark.parametrize(
    ("advantages", "loss", "factor"),
    [
        ("rloo", "dr_grpo", 1.0),
        ("mean_only", "dr_grpo", 1 / 2),  # (G − 1) / G
        ("rloo", "grpo", None),
        ("rloo", "token_mean", None),
        ("grpo", "dr_grpo", None),  # dividing by the group's deviation reweights questions
    ],
)
def test_groups_of_two_give_the_policy_gradient_where_length_and_deviation_stay_out(
    advantages: str, loss: str, factor: float | None
) -> None:
    """All pairs of sequences as groups, from rewards to gradient; up to a factor where named."""
    policy = SETTING.table(5)
    reward = np.random.default_rng(5).normal(size=len(SETTING.length))
    size, limit = len(reward), SETTING.limit
    pair = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    advantage = np.asarray(group_advantages(reward[pair], kind=advantages))
    logp = jnp.asarray(SETTING.token_logp(policy), jnp.float32)[pair]
    value = lambda x, a, m: policy_loss(x, x, a, m, kind=loss)[0]  # noqa: E731
    gradient = jax.vmap(jax.grad(value))(logp, advantage, jnp.asarray(SETTING.mask[pair]))
    # A member's gradient, averaged over what the other one may be.
    chance = SETTING.probability(policy)
    by_member = np.zeros((size, limit))
    for (first, second), g in zip(pair, np.asarray(gradient, np.float64), strict=True):
        by_member[first] += chance[second] * g[0]
        by_member[second] += chance[first] * g[1]
    got = limit * SETTING.expected(policy, policy, by_member)
    wanted = -reward_gradient(policy, reward)
    if factor is None:
        best = (got * wanted).sum() / (wanted**2).sum()  # no common factor explains it
        assert differs(got, best * wanted)
    else:
        close(got, factor * wanted)
