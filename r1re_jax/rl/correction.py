"""Off-policy correction: weights for tokens that another model drew than the one that is trained.

The sampler may compute in another precision, from quantised weights, or by another program. Then
its tokens are off policy before the first update, and their loss is weighted by importance: by the
ratio of the trainer's probability at the time of sampling (`old`) to the sampler's.

Sources: truncated importance sampling, Yao et al., "Your efficient RL framework secretly brings you
off-policy RL training" (2025); masking in place of truncation, by tokens or by whole rows: IcePop
and masked importance sampling, as TRL's GRPOConfig has them (`vllm_importance_sampling_mode`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from r1re_jax.rl.kinds import CorrectionKind, pick
from r1re_jax.rl.masks import as_mask, keep, require_shape

# Log-ratios beyond it are reported as it: their exponentials would be infinite.
LARGEST = 20.0
# The difference of the sampler's and the trainer's log-probabilities is reported by TRL's name.
LOGP_DIFFERENCE = "sampling/sampling_logp_difference"


def importance_weights(
    old_logp_PGC: ArrayLike,
    sampler_logp_PGC: ArrayLike,
    mask_PGC: ArrayLike,
    *,
    kind: str,
    limit: float,
) -> jax.Array:
    """Return the weight of every token's policy loss, a constant.

    With ρ_t = exp(old − sampler) of a token and ρ = exp(Σ_t (old − sampler)) of its row:

        none                 1
        token_truncate       min(ρ_t, limit)
        token_mask           ρ_t, or 0 where ρ_t > limit
        sequence_truncate    min(ρ, limit)
        sequence_mask        ρ, or 0 where ρ > limit

    Args:
        old_logp_PGC: [*B, C] under the policy at sampling, as the trainer computes them.
        sampler_logp_PGC: [*B, C] as the sampler computed them.
        mask_PGC: [*B, C] bool or 0/1; nothing under 0 is read.
        kind: a `CorrectionKind` or its string, but not `auto`: see `chosen`.
        limit: the largest ratio.

    Returns:
        [*B, C] fp32, 0 under mask 0. A NaN stays, so that it is noticed.

    Raises:
        ValueError: unknown `kind` or `auto`, or shapes that do not fit.
    """
    kind = pick(CorrectionKind, kind)
    mask = as_mask(mask_PGC)
    log_ratio = _log_ratio(old_logp_PGC, sampler_logp_PGC, mask)
    match kind:
        case CorrectionKind.AUTO:
            raise ValueError("auto is a choice between kinds; resolve it with `chosen` first")
        case CorrectionKind.NONE:
            return mask.astype(jnp.float32)
        case CorrectionKind.TOKEN_TRUNCATE | CorrectionKind.TOKEN_MASK:
            ratio = jnp.exp(log_ratio)
        case CorrectionKind.SEQUENCE_TRUNCATE | CorrectionKind.SEQUENCE_MASK:
            row = jnp.sum(log_ratio, axis=-1, keepdims=True)
            ratio = jnp.broadcast_to(jnp.exp(row), log_ratio.shape)
    if kind in (CorrectionKind.TOKEN_TRUNCATE, CorrectionKind.SEQUENCE_TRUNCATE):
        weight = jnp.minimum(ratio, limit)
    else:
        weight = jnp.where(ratio > limit, 0.0, ratio)
    return jnp.where(mask, weight, 0.0)


def chosen(kind: str, *, sampler_differs: bool) -> CorrectionKind:
    """Return what a kind means: `auto` masks rows where the sampler differs, else does nothing."""
    kind = pick(CorrectionKind, kind)
    if kind is not CorrectionKind.AUTO:
        return kind
    return CorrectionKind.SEQUENCE_MASK if sampler_differs else CorrectionKind.NONE


def correction_sums(
    old_logp_PGC: ArrayLike,
    sampler_logp_PGC: ArrayLike,
    mask_PGC: ArrayLike,
    *,
    weight_PGC: ArrayLike | None = None,
    long_PG: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Return what `correction_metrics` needs, as sums that micro-batches add up.

    Args:
        old_logp_PGC: [*B, C] under the policy at sampling, as the trainer computes them.
        sampler_logp_PGC: [*B, C] as the sampler computed them.
        mask_PGC: [*B, C] bool or 0/1; nothing under 0 is read.
        weight_PGC: [*B, C] of `importance_weights`; None: no correction, and the sums are of the
            tokens' plain ratios, to see what one would have to correct.
        long_PG: [*B] bool, rows to report by themselves, of `longest_quarter`; None: none.
    """
    mask = as_mask(mask_PGC)
    difference = _log_ratio(old_logp_PGC, sampler_logp_PGC, mask)
    log_ratio = jnp.minimum(difference, LARGEST)
    weight = jnp.where(mask, jnp.exp(log_ratio), 0.0) if weight_PGC is None else weight_PGC
    masked = mask & (weight == 0)
    sums = {
        "sampler_kl": jnp.sum(jnp.expm1(log_ratio) - log_ratio),
        "importance": jnp.sum(weight),
        "importance_squared": jnp.sum(jnp.square(weight)),
        "sampler_masked": jnp.sum(masked, dtype=jnp.int32),
    }
    if long_PG is None:
        return sums
    long = mask & as_mask(long_PG)[..., None]
    return sums | {
        "tokens_long": jnp.sum(long, dtype=jnp.int32),
        "logp_gap_long": jnp.sum(jnp.where(long, jnp.abs(difference), 0.0)),
        "sampler_masked_long": jnp.sum(long & masked, dtype=jnp.int32),
    }


def longest_quarter(length_PG: np.ndarray) -> np.ndarray:
    """Return which rows are no shorter than the shortest of the longest quarter, [*B] bool.

    Rows of equal length are all among them or none is, so that it says nothing of their order.
    """
    lengths = np.ravel(length_PG)
    count = -(-lengths.size // 4)
    return np.asarray(length_PG) >= np.partition(lengths, -count)[-count]


def correction_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Divide once what `correction_sums` summed; `tokens` is among the sums.

    Returns:
        `sampling/kl`: KL(sampler‖trainer) a token, estimated by k3 from the sampler's tokens;
        `sampling/ess`: effective sample size of the weights as a share of the tokens,
        (Σ w)² / (tokens · Σ w²) (Kish), 1 where all are equal; `sampling/masked`: share of tokens
        that the correction leaves out. Of long rows, where there are sums of them, the same as
        `sampling/masked_long`, and as `sampling/sampling_logp_difference/mean_long` the mean
        absolute difference.
    """
    tokens = max(sums["tokens"], 1)
    squares = tokens * sums["importance_squared"]
    figures = {
        "sampling/kl": sums["sampler_kl"] / tokens,
        "sampling/ess": sums["importance"] ** 2 / squares if squares else 0.0,
        "sampling/masked": sums["sampler_masked"] / tokens,
    }
    long = max(sums.get("tokens_long", 0), 1)
    names = {
        "logp_gap_long": f"{LOGP_DIFFERENCE}/mean_long",
        "sampler_masked_long": "sampling/masked_long",
    }
    return figures | {new: sums[name] / long for name, new in names.items() if name in sums}


def _log_ratio(old_logp: ArrayLike, sampler_logp: ArrayLike, mask: jax.Array) -> jax.Array:
    """Old − sampler, 0 under mask 0, without a gradient."""
    shape = np.shape(mask)
    require_shape("old_logp", old_logp, shape, "the mask")
    require_shape("sampler_logp", sampler_logp, shape, "the mask")
    return jax.lax.stop_gradient(keep(old_logp, mask) - keep(sampler_logp, mask))
