"""A policy so small that every sequence can be listed: expectations without sampling, in float64.

The policy is a table θ of logits with a row for every prefix, so that its gradient can be written
down: d log π(v | prefix) / dθ[prefix] = e_v − π(· | prefix).
"""

import itertools

import numpy as np


class Setting:
    """All sequences of up to `limit` tokens; one ends with `stop`, or is truncated at the limit.

    Attributes:
        sequence: [S, C] tokens, 0 in the padding.
        mask: [S, C] bool; the stop token belongs to its sequence.
        length: [S].
        prefix: [S, C] row of θ that each token is drawn from, 0 in the padding.
        prefixes: of row i of θ, the tokens before.
    """

    def __init__(self, *, vocabulary: int, limit: int, stop: int | None) -> None:
        going_on = [v for v in range(vocabulary) if v != stop]
        self.vocabulary, self.limit = vocabulary, limit
        self.prefixes = [p for n in range(limit) for p in itertools.product(going_on, repeat=n)]
        whole = [(*p, stop) for p in self.prefixes if stop is not None]
        whole += list(itertools.product(going_on, repeat=limit))
        row = {p: i for i, p in enumerate(self.prefixes)}
        self.length = np.array([len(s) for s in whole])
        self.mask = np.arange(limit) < self.length[:, None]
        self.sequence = np.zeros(self.mask.shape, int)
        self.prefix = np.zeros(self.mask.shape, int)
        for i, s in enumerate(whole):
            self.sequence[i, : len(s)] = s
            self.prefix[i, : len(s)] = [row[s[:t]] for t in range(len(s))]

    def table(self, seed: int) -> np.ndarray:
        """Draw logits θ [prefixes, V]."""
        return np.random.default_rng(seed).normal(size=(len(self.prefixes), self.vocabulary))

    def token_logp(self, theta: np.ndarray) -> np.ndarray:
        """[S, C] log-probability of every token, 0 in the padding."""
        return np.where(self.mask, log_softmax(theta)[self.prefix, self.sequence], 0.0)

    def probability(self, theta: np.ndarray) -> np.ndarray:
        """[S] probability of every sequence; they sum to 1."""
        return np.exp(self.token_logp(theta).sum(-1))

    def reached(self, theta: np.ndarray) -> np.ndarray:
        """[prefixes] probability that a sequence begins with this prefix."""
        logp = log_softmax(theta)
        row = {p: i for i, p in enumerate(self.prefixes)}
        chain = [[logp[row[p[:t]], v] for t, v in enumerate(p)] for p in self.prefixes]
        return np.exp([sum(terms) for terms in chain])

    def expected(
        self, policy: np.ndarray, drawn: np.ndarray, token_gradient: np.ndarray
    ) -> np.ndarray:
        """E over sequences of `drawn` of Σ_t g_t · d log π(y_t) / dθ, with g [S, C]: [prefixes, V].

        By the chain rule, the expected gradient in θ of a loss whose gradient in a sequence's
        log-probabilities is g.
        """
        total = np.zeros(policy.shape)
        pi = np.exp(log_softmax(policy))
        for s, chance in enumerate(self.probability(drawn)):
            for t in range(self.length[s]):
                at = self.prefix[s, t]
                score = np.eye(self.vocabulary)[self.sequence[s, t]] - pi[at]
                total[at] += chance * token_gradient[s, t] * score
        return total

    def kl(self, policy: np.ndarray, reference: np.ndarray, drawn: np.ndarray) -> float:
        """Σ over prefixes of P(prefix | drawn) · KL(policy‖reference) there."""
        return float(self.reached(drawn) @ _kl(policy, reference))

    def kl_gradient(
        self, policy: np.ndarray, reference: np.ndarray, drawn: np.ndarray
    ) -> np.ndarray:
        """Gradient of `kl` in the policy's logits, the prefixes' distribution held fixed.

        d KL / dθ_v = π_v (log(π_v / ref_v) − KL), since Σ_v π_v d log π_v = 0.
        """
        gap = log_softmax(policy) - log_softmax(reference)
        inner = gap - _kl(policy, reference)[:, None]
        return self.reached(drawn)[:, None] * np.exp(log_softmax(policy)) * inner

    def other_kl_gradient(
        self, policy: np.ndarray, fixed: np.ndarray, drawn: np.ndarray
    ) -> np.ndarray:
        """Gradient in the policy's logits of Σ P(prefix | drawn) · KL(fixed‖policy): π − fixed."""
        gap = np.exp(log_softmax(policy)) - np.exp(log_softmax(fixed))
        return self.reached(drawn)[:, None] * gap


def log_softmax(theta: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = theta - theta.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _kl(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """KL(policy‖reference) at every prefix."""
    logp = log_softmax(policy)
    return (np.exp(logp) * (logp - log_softmax(reference))).sum(-1)
