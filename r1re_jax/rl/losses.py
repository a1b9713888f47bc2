"""Policy losses: a clipped objective per token, and weights that say what share each token has.

The two are kept apart because of micro-batches. Each kind is loss = Σ weight · token loss, with
weights that need the whole batch (its rows, its tokens) but none of the model's outputs. They are
computed once for the whole batch; every micro-batch or device then adds its part of one and the
same sum, whatever the split.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from r1re_jax.rl.kinds import LossKind, pick
from r1re_jax.rl.masks import as_mask, count, keep, require_shape


def policy_loss(
    logp_PGC: ArrayLike,
    old_logp_PGC: ArrayLike,
    advantage_PG: ArrayLike,
    mask_PGC: ArrayLike,
    *,
    kind: str = LossKind.GRPO,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    length: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reduce the token losses of a whole batch to the loss to be minimised.

    Token losses are those of `token_policy_loss`, reduced by the weights of `token_weights`.

    Args:
        logp_PGC: [*B, C] log-probabilities of the completions' tokens under the policy.
        old_logp_PGC: [*B, C] under the policy that drew them; a constant.
        advantage_PG: [*B]; a constant.
        mask_PGC: [*B, C] bool or 0/1; nothing under 0 is read.
        kind: a `LossKind` or its string.
        clip_low: the ratio is clipped from below at 1 − clip_low.
        clip_high: and from above at 1 + clip_high.
        length: of `dr_grpo`, the constant that stands for a row's length; None = C.

    Returns:
        fp32 scalar, and means over the unmasked tokens (0 where there are none): `ratio`,
        `clip_low` and `clip_high` (fractions whose gradient the clip changed), `old_kl`
        (k3 estimate of KL(old‖policy)).

    Raises:
        ValueError: unknown `kind`, shapes that do not fit, `length` < 1.
    """
    mask = as_mask(mask_PGC)
    token_loss, statistics = token_policy_loss(
        logp_PGC,
        old_logp_PGC,
        advantage_PG,
        mask,
        kind=kind,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    weight = token_weights(mask, kind=kind, length=length)
    tokens = count(mask)
    return jnp.sum(weight * token_loss), {
        name: jnp.sum(value) / tokens for name, value in statistics.items()
    }


def token_weights(
    mask_PGC: ArrayLike, *, kind: str = LossKind.GRPO, length: int | None = None
) -> jax.Array:
    """Weight of every token in the batch's loss; Σ weight · token loss is the loss.

        grpo, gspo            1 / (rows · tokens of the row): mean over rows of their token
                              means; an empty row counts 0, and counts as a row
        token_mean, cispo     1 / tokens of all rows             DAPO, arXiv 2503.14476, 3.3
        bnpo                  the same: the two differ in what one call is given. Called with the
                              global batch it is token_mean; called with each of m micro-batches
                              and divided by m, it is what is elsewhere called BNPO
        dr_grpo               1 / (rows · length)                Dr. GRPO, arXiv 2503.20783, 3.2

    Args:
        mask_PGC: [*B, C] bool or 0/1 of the *whole* batch; rows are all of B.
        kind: a `LossKind` or its string.
        length: of `dr_grpo`, None = C.

    Returns:
        [*B, C] fp32, 0 under mask 0.

    Raises:
        ValueError: unknown `kind`, no token axis, `length` < 1.
    """
    kind = pick(LossKind, kind)
    mask = as_mask(mask_PGC)
    if mask.ndim == 0:
        raise ValueError("the mask is a scalar; expected an array whose last axis is the tokens")
    if length is not None and length < 1:
        raise ValueError(f"length is {length}; dr_grpo divides by it, so it must be at least 1")
    limit = mask.shape[-1]
    rows = max(mask.size // max(limit, 1), 1)
    match kind:
        case LossKind.GRPO | LossKind.GSPO:
            denominator = rows * count(mask, -1, keepdims=True)
        case LossKind.TOKEN_MEAN | LossKind.BNPO | LossKind.CISPO:
            denominator = count(mask)
        case LossKind.DR_GRPO:
            denominator = jnp.float32(rows * (limit if length is None else length))
    return jnp.where(mask, 1.0 / denominator, 0.0)


def token_policy_loss(
    logp_PGC: ArrayLike,
    old_logp_PGC: ArrayLike,
    advantage_PG: ArrayLike,
    mask_PGC: ArrayLike,
    *,
    kind: str = LossKind.GRPO,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of every token before any averaging; arguments as in `policy_loss`.

    With ρ = exp(logp − old), clip(·) to [1 − clip_low, 1 + clip_high] and sg a stopped gradient:

        grpo, token_mean, bnpo, dr_grpo   −min(ρ·A, clip(ρ)·A)   PPO, arXiv 1707.06347, (7)
        gspo    −min(s·A, clip(s)·A), s = exp(mean over the row of logp − old), one for all
                tokens of the row                                arXiv 2507.18071, (5) and (7)
        cispo   −sg(clip(ρ))·A·logp                              arXiv 2506.13585, (4) and (5)

    For A < 0 the clip lets −ρ·A grow with ρ without bound. The dual clip (arXiv 1912.09729, (5))
    bounds the objective from below, for A < 0 alone:

        −max(min(ρ·A, clip(ρ)·A), dual_clip·A)

    `dual_clip` is above 1, or 0 for none; `cispo` has none, since clip_high bounds its weight.

    The old log-probabilities and the advantages carry no gradient, so `old = logp` means on policy.

    Returns:
        [*B, C] fp32 losses, 0 under mask 0, and per-token statistics of the same shape, 0 there too
        (see `policy_loss`; `dual_clip`, where it is on, is the fraction that it bounds). The clip
        of `cispo` is told whatever the advantage's sign, that of the others where it takes the
        gradient away.

    Raises:
        ValueError: as `policy_loss`, and a dual clip that `check_dual_clip` refuses.
    """
    kind = pick(LossKind, kind)
    check_dual_clip(dual_clip, kind=kind)
    shape = np.shape(logp_PGC)
    require_shape("old_logp", old_logp_PGC, shape, "logp")
    require_shape("mask", mask_PGC, shape, "logp")
    require_shape("advantage", advantage_PG, shape[:-1], "logp without its token axis")
    mask = as_mask(mask_PGC)
    logp = keep(logp_PGC, mask)
    old_logp = jax.lax.stop_gradient(keep(old_logp_PGC, mask))
    # Masked too: a row without tokens has no say, whatever its advantage.
    advantage = jax.lax.stop_gradient(keep(jnp.asarray(advantage_PG)[..., None], mask))

    token_log_ratio = logp - old_logp
    log_ratio = token_log_ratio
    if kind is LossKind.GSPO:
        row_mean = log_ratio.sum(-1, keepdims=True) / count(mask, -1, keepdims=True)
        log_ratio = jnp.where(mask, row_mean, 0.0)
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    if kind is LossKind.CISPO:
        loss = -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage * logp
    else:
        # min() takes the clipped branch only where it is the worse one for the objective.
        below, above = below & (advantage < 0), above & (advantage > 0)
        bound, clipped = jnp.where(below, 1 - clip_low, 1 + clip_high), below | above
        if dual_clip:
            dual = (advantage < 0) & (ratio > dual_clip)
            bound, clipped = jnp.where(dual, dual_clip, bound), clipped | dual
        loss = -_bounded_ratio(log_ratio, bound, clipped, advantage) * advantage
    constant_log_ratio = jax.lax.stop_gradient(token_log_ratio)
    statistics = {
        "ratio": jnp.where(mask, ratio, 0.0),
        "clip_low": keep(below, mask),
        "clip_high": keep(above, mask),
        "old_kl": jnp.expm1(constant_log_ratio) - constant_log_ratio,
    }
    if dual_clip:
        statistics["dual_clip"] = keep(dual, mask)
    return jnp.where(mask, loss, 0.0), statistics


def check_dual_clip(dual_clip: float, *, kind: LossKind) -> None:
    """Refuse a dual clip without meaning.

    Raises:
        ValueError: not 0 and not above 1, or of a kind whose loss has no ratio to bound.
    """
    if dual_clip and not dual_clip > 1:
        raise ValueError(
            f"dual_clip is {dual_clip}; on policy the ratio is 1, so it must be above 1, or 0 for"
            " none"
        )
    if dual_clip and kind is LossKind.CISPO:
        raise ValueError("dual_clip bounds a ratio; the weight of cispo is bounded by clip_high")


def _bounded_ratio(
    log_ratio: jax.Array, bound: jax.Array, clipped: jax.Array, advantage: jax.Array
) -> jax.Array:
    """Return exp(log_ratio), or the constant `bound` where clipped.

    exp is not evaluated where its value is not used (clipped, or an advantage of 0): an overflow
    there would make the gradient 0 · inf = NaN. A NaN ratio stays, so that it is noticed.
    """
    unused = clipped | ((advantage == 0) & ~jnp.isnan(log_ratio))
    return jnp.where(clipped, bound, jnp.exp(jnp.where(unused, 0.0, log_ratio)))
