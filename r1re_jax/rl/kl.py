"""KL(policy‖reference) from sampled tokens: four estimators, one of them right as a loss.

Estimators k1, k2, k3 are Schulman's ("Approximating KL divergence", 2020,
joschu.net/blog/kl-approx.html). What is wanted of a *loss* is that its expected gradient be that of
Σ_t KL(policy‖reference) at the sampled prefixes, their distribution held fixed. Differentiated as
they stand, on policy:

    k1   has expected gradient 0 (it is the score function): as a loss it does nothing
    k2   has the wanted gradient, but as a value it is biased
    k3   has the wanted value, but its gradient is that of KL(reference‖policy)
    k3_plus   has the value of k3 and the gradient of k2, and is unbiased off policy in both

`k3_plus` weights k3 with the importance ratio (DeepSeek-V3.2, arXiv 2512.02556, 3.1); the gradients
are compared in arXiv 2506.09477 and arXiv 2510.01555.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from r1re_jax.rl.kinds import KlKind, pick
from r1re_jax.rl.masks import as_mask, count, keep, require_shape

# The importance ratio of `k3_plus` is at most e^80: infinity times a k3 of 0 would be NaN.
LARGEST = 80.0


def kl_loss(
    logp_PGC: ArrayLike,
    ref_logp_PGC: ArrayLike,
    mask_PGC: ArrayLike,
    *,
    kind: str,
    old_logp_PGC: ArrayLike | None = None,
) -> jax.Array:
    """Mean of `token_kl` over the unmasked tokens; 0 if there are none.

    Args:
        logp_PGC: [*B, C] log-probabilities of the tokens under the policy.
        ref_logp_PGC: [*B, C] under the reference; a constant.
        mask_PGC: [*B, C] bool or 0/1; nothing under 0 is read.
        kind: a `KlKind` or its string.
        old_logp_PGC: [*B, C] under the policy that drew the tokens, a constant; only `k3_plus`
            reads it. None: the policy itself drew them.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: unknown `kind`, or shapes that do not fit.
    """
    kind = pick(KlKind, kind)
    require_shape("mask", mask_PGC, np.shape(logp_PGC), "logp")
    mask = as_mask(mask_PGC)
    token = token_kl(logp_PGC, ref_logp_PGC, mask, kind=kind, old_logp_PGC=old_logp_PGC)
    return jnp.sum(token) / count(mask)


def token_kl(
    logp_PGC: ArrayLike,
    ref_logp_PGC: ArrayLike,
    mask_PGC: ArrayLike,
    *,
    kind: str,
    old_logp_PGC: ArrayLike | None = None,
) -> jax.Array:
    """Estimate KL(policy‖reference) at every token; arguments as in `kl_loss`.

    With d = ref − logp:

        k1        −d
        k2        d² / 2
        k3        exp(d) − d − 1
        k3_plus   exp(min(logp − old, 80)) · k3

    Returns:
        [*B, C] fp32, 0 under mask 0.
    """
    kind = pick(KlKind, kind)
    shape = np.shape(logp_PGC)
    require_shape("ref_logp", ref_logp_PGC, shape, "logp")
    mask = as_mask(mask_PGC)
    logp = keep(logp_PGC, mask)
    gap = jax.lax.stop_gradient(keep(ref_logp_PGC, mask)) - logp
    match kind:
        case KlKind.K1:
            return -gap
        case KlKind.K2:
            return jnp.square(gap) / 2
        case KlKind.K3:
            return _k3(gap)
        case KlKind.K3_PLUS:
            if old_logp_PGC is not None:
                require_shape("old_logp", old_logp_PGC, shape, "logp")
            old_logp = logp if old_logp_PGC is None else keep(old_logp_PGC, mask)
            log_ratio = logp - jax.lax.stop_gradient(old_logp)
            return jnp.exp(jnp.minimum(log_ratio, LARGEST)) * _k3(gap)


def _k3(gap: jax.Array) -> jax.Array:
    """exp(d) − d − 1; expm1 keeps it ≥ 0 and its digits where d is small."""
    return jnp.expm1(gap) - gap
