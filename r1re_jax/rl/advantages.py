"""Advantages: how much better a completion's reward is than that of its group."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from r1re_jax.rl.kinds import AdvantageKind, pick

EPSILON = 1e-4  # added to the standard deviation


def group_advantages(reward_PG: ArrayLike, *, kind: str = AdvantageKind.GRPO) -> jax.Array:
    """Centre each group's rewards on their mean and scale them as `kind` says.

    With r a group's rewards and std the sample standard deviation (n − 1):

        grpo        (r − mean r) / (std r + 1e-4)        DeepSeekMath, arXiv 2402.03300, 4.1.2
        mean_only   r − mean r                           Dr. GRPO, arXiv 2503.20783, 3.2
        batch       (r − mean r) / (std of all rewards + 1e-4)      Lite PPO, arXiv 2508.08221
        rloo        (r − mean r) · G / (G − 1), that is r minus the mean of the *others*
                                                         RLOO, arXiv 2402.14740

    A group of one, or of equal rewards, has nothing to compare: its advantages are exactly 0 (and
    not rounding noise divided by 1e-4). A NaN reward stays NaN, so that it is noticed.

    Args:
        reward_PG: [*B, G] of any real dtype; the last axis is the group, `batch` pools all axes.
        kind: an `AdvantageKind` or its string.

    Returns:
        [*B, G] fp32.

    Raises:
        ValueError: unknown `kind`, or no group axis.
    """
    kind = pick(AdvantageKind, kind)
    reward = jnp.asarray(reward_PG, jnp.float32)
    if reward.ndim == 0:
        raise ValueError("rewards are a scalar; expected an array whose last axis is the group")
    group = reward.shape[-1]
    centred = reward - reward.mean(-1, keepdims=True)
    match kind:
        case AdvantageKind.GRPO:
            advantage = centred / (_deviation(reward, -1) + EPSILON)
        case AdvantageKind.MEAN_ONLY:
            advantage = centred
        case AdvantageKind.BATCH:
            advantage = centred / (_deviation(reward, None) + EPSILON)
        case AdvantageKind.RLOO:
            advantage = centred * (group / max(group - 1, 1))
    # A comparison, not the deviation: the mean of equal fp32 rewards need not be that reward.
    spread = reward.max(-1, keepdims=True) - reward.min(-1, keepdims=True)
    return jnp.where(spread == 0, 0.0, advantage)


def combined_advantages(
    reward_RPG: ArrayLike, weight_R: Sequence[float], *, kind: str = AdvantageKind.GRPO
) -> jax.Array:
    """Return the weighted sum of each reward's own group advantages.

    Σ_r weight_r · group_advantages(reward_r): every reward is normalised over its group before they
    are added, so that the weights say what counts how much, whatever the rewards' scales, and rows
    that differ in one reward alone keep different advantages. Added up first, rewards of different
    kinds can collapse to equal sums (GDPO, arXiv 2601.05242; its second normalisation, over the
    whole batch, is left out: one weight of 1 is then `group_advantages` itself).

    Args:
        reward_RPG: [R, *B, G], R rewards of the same completions.
        weight_R: R numbers.
        kind: an `AdvantageKind` or its string.

    Returns:
        [*B, G] fp32.

    Raises:
        ValueError: unknown `kind`, no group axis, or another number of weights than of rewards.
    """
    rewards = [jnp.asarray(reward) for reward in reward_RPG]
    if not rewards or len(rewards) != len(weight_R):
        raise ValueError(f"there are {len(rewards)} rewards and {len(weight_R)} weights")
    parts = (
        weight * group_advantages(reward, kind=kind)
        for weight, reward in zip(weight_R, rewards, strict=True)
    )
    return functools.reduce(operator.add, parts)


def _deviation(reward: jax.Array, axis: int | None) -> jax.Array:
    """Sample standard deviation over `axis`, kept; 0 for a single value, whose n − 1 is 0."""
    number = reward.size if axis is None else reward.shape[axis]
    # Squares leave fp32 beyond 1e19, which would make every advantage 0. Scaling by a power of two
    # costs no digits.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(reward), axis, keepdims=True))
    scaled = jnp.std(jnp.ldexp(reward, -exponent), axis, ddof=min(1, number - 1), keepdims=True)
    return jnp.ldexp(scaled, exponent)
