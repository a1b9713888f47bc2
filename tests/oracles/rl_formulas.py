"""Advantages, losses and KL terms in NumPy float64, token by token as the papers write them."""

import math
from collections.abc import Callable

import numpy as np


def advantages(reward_PG: np.ndarray, kind: str) -> np.ndarray:
    """Group advantages: DeepSeekMath, Dr. GRPO, Lite PPO, RLOO."""
    reward_PG = np.asarray(reward_PG, np.float64)
    out = np.zeros(reward_PG.shape)
    size = reward_PG.shape[1]
    for p, row in enumerate(reward_PG):
        if size == 1 or len(set(row.tolist())) == 1:
            continue
        for g, reward in enumerate(row):
            mean = sum(row) / size
            if kind == "grpo":
                variance = sum((r - mean) ** 2 for r in row) / (size - 1)
                out[p, g] = (reward - mean) / (math.sqrt(variance) + 1e-4)
            elif kind == "mean_only":
                out[p, g] = reward - mean
            elif kind == "batch":
                pool = reward_PG.ravel()
                variance = sum((r - pool.mean()) ** 2 for r in pool) / (len(pool) - 1)
                out[p, g] = (reward - mean) / (math.sqrt(variance) + 1e-4)
            elif kind == "rloo":
                others = np.delete(row, g)
                out[p, g] = reward - others.mean()
    return out


def policy_loss(
    logp: np.ndarray,
    old: np.ndarray,
    advantage: np.ndarray,
    mask: np.ndarray,
    *,
    kind: str,
    low: float = 0.2,
    high: float = 0.2,
    length: int | None = None,
    dual: float = 0.0,
) -> float:
    """Sum of per-token (or, for gspo, per-row) terms with the paper's denominators."""
    prompts, group, limit = logp.shape

    def clip(ratio: float) -> float:
        return min(max(ratio, 1 - low), 1 + high)

    def bounded(ratio: float, a: float) -> float:
        objective = min(ratio * a, clip(ratio) * a)
        return max(objective, dual * a) if dual and a < 0 else objective

    def term(p: int, g: int, t: int) -> float:
        ratio, a = math.exp(logp[p, g, t] - old[p, g, t]), advantage[p, g]
        if kind == "cispo":
            return -clip(ratio) * a * logp[p, g, t]
        return -bounded(ratio, a)

    total = 0.0
    for p, g in np.ndindex(prompts, group):
        tokens = [t for t in range(limit) if mask[p, g, t]]
        if not tokens:
            continue
        if kind == "gspo":
            mean = sum(logp[p, g, t] - old[p, g, t] for t in tokens) / len(tokens)
            s, a = math.exp(mean), advantage[p, g]
            total += -bounded(s, a) / (prompts * group)
            continue
        row = sum(term(p, g, t) for t in tokens)
        if kind == "grpo":
            total += row / len(tokens) / (prompts * group)
        elif kind in ("token_mean", "bnpo", "cispo"):
            total += row / np.count_nonzero(mask)
        elif kind == "dr_grpo":
            total += row / (prompts * group * (length or limit))
        else:
            raise AssertionError(kind)
    return total


def kl_loss(
    logp: np.ndarray, ref: np.ndarray, mask: np.ndarray, *, kind: str, old: np.ndarray | None = None
) -> float:
    """Token mean of Schulman's k1, k2, k3, or of k3 under the importance ratio."""
    old = logp if old is None else old
    terms = []
    for i in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(ref[i] - logp[i])  # reference / policy
        k3 = ratio - 1 - math.log(ratio)
        terms.append(
            {
                "k1": -math.log(ratio),
                "k2": math.log(ratio) ** 2 / 2,
                "k3": k3,
                "k3_plus": math.exp(logp[i] - old[i]) * k3,
            }[kind]
        )
    return sum(terms) / len(terms) if terms else 0.0


def numeric_gradient(
    f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6
) -> np.ndarray:
    """Central differences of f at x, entry by entry."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (f(up) - f(down)) / (2 * step)
    return gradient
