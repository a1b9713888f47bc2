"""Gradients in the log-probabilities, derived by hand from the papers' formulas, in NumPy float64.

Written token by token, apart from `rl_formulas`; the tests compare both by finite differences.
"""

import math

import numpy as np

TOKEN_MEANS = ("token_mean", "bnpo", "cispo")


def share(mask: np.ndarray, row: tuple[int, ...], *, kind: str, length: int | None = None) -> float:
    """Share of each token of a row in the loss."""
    rows, tokens = math.prod(mask.shape[:-1]), int(mask[row].sum())
    if kind in TOKEN_MEANS:
        return 1 / int(mask.sum())
    if kind == "dr_grpo":
        return 1 / (rows * (length or mask.shape[-1]))
    return 1 / (rows * tokens)


def clipped(ratio: float, advantage: float, *, low: float, high: float) -> bool:
    """Whether min(ρA, clip(ρ)A) takes the constant branch."""
    return ratio > 1 + high if advantage > 0 else ratio < 1 - low and advantage < 0


def policy_gradient(
    logp: np.ndarray,
    old: np.ndarray,
    advantage: np.ndarray,
    mask: np.ndarray,
    *,
    kind: str,
    low: float = 0.2,
    high: float = 0.2,
    length: int | None = None,
) -> np.ndarray:
    """Gradient of the whole batch's policy loss.

    PPO's clip: dρ/dlogp = ρ, so −ρA where not clipped, else 0 (1707.06347, 7).
    GSPO: the row's ratio s is exp of a mean over its |y| tokens, so each of them gets 1/|y| of the
    row's −sA (2507.18071, 10).
    CISPO: the clipped ratio is a constant before logp (2506.13585, 4).
    """
    out = np.zeros(logp.shape)
    for row in np.ndindex(logp.shape[:-1]):
        tokens, a = np.flatnonzero(mask[row]), float(advantage[row])
        if tokens.size == 0:
            continue
        weight = share(mask, row, kind=kind, length=length)
        ratios = [math.exp(logp[row][t] - old[row][t]) for t in tokens]
        if kind == "gspo":
            ratios = [math.prod(ratios) ** (1 / len(tokens))] * len(tokens)
        for t, ratio in zip(tokens, ratios, strict=True):
            if kind == "cispo":
                out[(*row, t)] = -weight * min(max(ratio, 1 - low), 1 + high) * a
            elif not clipped(ratio, a, low=low, high=high):
                out[(*row, t)] = -weight * ratio * a
    return out


def kl_terms(
    logp: np.ndarray, ref: np.ndarray, old: np.ndarray, *, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative of each token's KL estimate, with r = ref/π (Schulman 2020)."""
    log_r = ref - logp
    r = np.exp(log_r)
    if kind == "k1":
        return -log_r, np.ones_like(r)
    if kind == "k2":
        return log_r**2 / 2, -log_r
    if kind == "k3":
        return r - 1 - log_r, 1 - r
    ratio = np.exp(logp - old)  # product rule: ρ·k3 + ρ·(1 − r) = −ρ·log r
    return ratio * (r - 1 - log_r), -ratio * log_r


def objective_kl(
    logp: np.ndarray,
    ref: np.ndarray,
    old: np.ndarray,
    mask: np.ndarray,
    *,
    kl_kind: str,
    kind: str,
    length: int | None = None,
) -> tuple[float, np.ndarray]:
    """KL term with the weights of loss `kind`, before β, and its gradient."""
    value, gradient = 0.0, np.zeros(logp.shape)
    for row in np.ndindex(logp.shape[:-1]):
        for t in np.flatnonzero(mask[row]):
            at = (*row, t)
            weight = share(mask, row, kind=kind, length=length)
            term, slope = kl_terms(logp[at], ref[at], old[at], kind=kl_kind)
            value += weight * term
            gradient[at] = weight * slope
    return value, gradient
