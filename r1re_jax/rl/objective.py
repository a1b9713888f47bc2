"""What training minimises: policy loss, KL term and entropy bonus, as sums over micro-batches.

    weight = token_weights(mask of the whole batch)            once a step
    loss, sums = objective(…, its part of weight, settings)    every micro-batch; add the gradients
    metrics(sums added up)                                     once a step

The result depends neither on the number of micro-batches nor on which rows share one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from r1re_jax.rl.kinds import KlKind, LossKind, pick
from r1re_jax.rl.kl import token_kl
from r1re_jax.rl.losses import check_dual_clip, token_policy_loss
from r1re_jax.rl.masks import as_mask, keep, require_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The objective's settings; hashable, so that it can be a static argument of jit.

    Attributes:
        kind: policy objective; a string is turned into its `LossKind`.
        clip_low: the ratio is clipped from below at 1 − clip_low.
        clip_high: and from above at 1 + clip_high.
        dual_clip: bounds the objective of negative advantages, see `token_policy_loss`; 0 = off.
        length: of `dr_grpo`, the constant that stands for a row's length; None = the padded one.
        kl_coefficient: β, weight of the KL term; with 0 no reference is needed.
        kl_kind: its estimator; a string is turned into its `KlKind`.
        entropy_coefficient: weight of the entropy bonus; with 0 no entropies are needed.
    """

    kind: LossKind = LossKind.GRPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    length: int | None = None
    kl_coefficient: float = 0.001
    kl_kind: KlKind = KlKind.K3_PLUS
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        object.__setattr__(self, "kind", pick(LossKind, self.kind))
        object.__setattr__(self, "kl_kind", pick(KlKind, self.kl_kind))
        if not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"clip_low is {self.clip_low}; ratios lie above 0, so it must be in [0, 1]"
            )
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high is {self.clip_high}; it must be at least 0")
        check_dual_clip(self.dual_clip, kind=self.kind)
        for name in ("kl_coefficient", "entropy_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.length is not None and self.length < 1:
            raise ValueError(
                f"length is {self.length}; dr_grpo divides by it, so it must be at least 1"
            )


def objective(
    logp_PGC: ArrayLike,
    *,
    old_logp_PGC: ArrayLike,
    ref_logp_PGC: ArrayLike | None,
    advantage_PG: ArrayLike,
    mask_PGC: ArrayLike,
    weight_PGC: ArrayLike,
    settings: LossSettings,
    entropy_PGC: ArrayLike | None = None,
    importance_PGC: ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ weight · (policy loss + β · KL − c · entropy) over the tokens given.

    Equation 3 of GRPO (arXiv 2402.03300) with the KL term weighted as the policy loss is, and its
    gradient that of KL(policy‖reference) (see `r1re_jax.rl.kl`). The entropy bonus of PPO (arXiv
    1707.06347, equation 9) is weighted in the same way: by `token_mean` it is c times the mean
    entropy of a token.

    Args:
        logp_PGC: [*B, C] under the policy, of the whole batch or of some of its rows; differentiate
            with respect to it.
        old_logp_PGC: [*B, C] under the policy that drew the tokens.
        ref_logp_PGC: [*B, C] under the reference; None only if the KL coefficient is 0.
        advantage_PG: [*B].
        mask_PGC: [*B, C] bool or 0/1; nothing under 0 is read.
        weight_PGC: [*B, C], these rows' part of `token_weights` of the *whole* batch.
        settings: see `LossSettings`.
        entropy_PGC: [*B, C] entropy of the distribution that each token was drawn from;
            differentiated. None only if its coefficient is 0.
        importance_PGC: [*B, C] of `r1re_jax.rl.correction.importance_weights`, multiplied with the
            policy loss alone; None for 1.

    Returns:
        fp32 scalar, and sums for `metrics`; add those of all micro-batches leaf by leaf.

    Raises:
        ValueError: no reference or entropies though their coefficient is not 0; shapes that do not
            fit.
    """
    if entropy_PGC is None and settings.entropy_coefficient:
        raise ValueError(
            f"entropy_coefficient is {settings.entropy_coefficient} but there are no entropies"
        )
    if ref_logp_PGC is None and settings.kl_coefficient:
        raise ValueError(f"kl_coefficient is {settings.kl_coefficient} but there are no ref_logp")
    require_shape("weight", weight_PGC, np.shape(logp_PGC), "logp")
    mask = as_mask(mask_PGC)
    weight = jax.lax.stop_gradient(keep(weight_PGC, mask))
    token_loss, statistics = token_policy_loss(
        logp_PGC,
        old_logp_PGC,
        advantage_PG,
        mask,
        kind=settings.kind,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    if importance_PGC is not None:
        require_shape("importance", importance_PGC, np.shape(logp_PGC), "logp")
        token_loss = jax.lax.stop_gradient(keep(importance_PGC, mask)) * token_loss
    loss = policy = jnp.sum(weight * token_loss)
    sums = {name: jnp.sum(value) for name, value in statistics.items()}
    sums |= {"policy_loss": policy, "tokens": jnp.sum(mask, dtype=jnp.int32)}
    if ref_logp_PGC is not None:
        token = token_kl(
            logp_PGC, ref_logp_PGC, mask, kind=settings.kl_kind, old_logp_PGC=old_logp_PGC
        )
        sums["kl_loss"] = jnp.sum(weight * token)
        sums["kl"] = jnp.sum(token_kl(logp_PGC, ref_logp_PGC, mask, kind=KlKind.K3))
        if settings.kl_coefficient:
            loss = loss + settings.kl_coefficient * sums["kl_loss"]
    if settings.entropy_coefficient:
        require_shape("entropy", entropy_PGC, np.shape(logp_PGC), "logp")
        bonus = settings.entropy_coefficient * jnp.sum(weight * keep(entropy_PGC, mask))
        loss, sums["entropy_bonus"] = loss - bonus, bonus
    return loss, jax.lax.stop_gradient(sums)


def metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Divide once what `objective` summed over all micro-batches.

    Returns:
        `policy_loss`, `kl_loss` (before β) and `entropy_bonus` as they enter the loss; means over
        tokens `ratio`, `clip_low`, `clip_high`, `dual_clip` (where it is on), `old_kl`, `kl` (k3
        whatever the loss uses); `tokens`.
    """
    whole = {"policy_loss", "kl_loss", "entropy_bonus", "tokens"}
    tokens = jnp.maximum(sums["tokens"], 1).astype(jnp.float32)
    return {name: value if name in whole else value / tokens for name, value in sums.items()}
