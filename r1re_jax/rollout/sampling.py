"""Drawing one token per row from logits: pure functions of logits and keys."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is drawn. Filters work in the order of the fields, each on what the last left.

    Attributes:
        temperature: logits are divided by it; 0 is greedy: the most likely token, no filter.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that together have at least this probability
            (nucleus sampling, arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one (arXiv
            2407.01082); 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a number above"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k is {self.top_k}; it must be 0 (keep all) or a number of tokens"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (keep all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must lie between 0 (keep all) and 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether tokens can be left out, so that log-probabilities are not those drawn from."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, settings: SamplingSettings
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row, each row with its own key.

    The draw is argmax(logits + Gumbel noise) (Gumbel-max trick; arXiv 1411.0030, section 2), so a
    row's token depends on its own logits and key alone.

    Args:
        logits_BV: [*B, V] fp32.
        keys_B: typed keys [*B], one per row and token; not read where greedy.
        settings: static.

    Returns:
        tokens [*B] int32, and their fp32 log-probabilities [*B] under the whole softmax at the
        temperature, no token filtered: what training scores. Where greedy, at temperature 1.
    """
    scaled_BV = logits_BV if settings.greedy else logits_BV / settings.temperature
    if settings.greedy:
        tokens_B = _argmax(scaled_BV)
    else:
        noise_BV = gumbel(keys_B, logits_BV.shape[-1])
        tokens_B = _argmax(filter_logits(scaled_BV, settings) + noise_BV)
    # A sum under a comparison, not a gather: the vocabulary axis may be sharded.
    chosen_BV = _indices(scaled_BV) == tokens_B[..., None]
    chosen_B = jnp.sum(jnp.where(chosen_BV, scaled_BV, 0.0), axis=-1)
    logp_B = chosen_B - jax.nn.logsumexp(scaled_BV, axis=-1)
    return tokens_B, logp_B


def gumbel(keys_B: jax.Array, vocab: int) -> jax.Array:
    """Return standard Gumbel noise [*B, vocab] fp32, row b from key b."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys_B.reshape(-1))
    return noise.reshape(*keys_B.shape, vocab)


def filter_logits(scaled_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Set the logits of tokens that may not be drawn to −inf: top-k, then top-p, then min-p.

    Each filter is a threshold on the logit, so tokens that tie at the border stay together. Where
    no filter is set nothing is computed.

    Args:
        scaled_BV: [*B, V] fp32, already divided by the temperature.
        settings: static.
    """
    vocab = scaled_BV.shape[-1]
    if 0 < settings.top_k < vocab:
        kept_Bk = jax.lax.top_k(scaled_BV, settings.top_k)[0]
        scaled_BV = _at_least(scaled_BV, kept_Bk[..., -1:])
    if settings.top_p < 1:
        sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
        prob_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those before it do not reach top_p yet; so the first always stays.
        stays_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < settings.top_p
        border_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        scaled_BV = _at_least(scaled_BV, border_B1)
    if settings.min_p > 0:
        top_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
        scaled_BV = _at_least(scaled_BV, top_B1 + math.log(settings.min_p))
    return scaled_BV


def _argmax(x_BV: jax.Array) -> jax.Array:
    """Return the first index [*B] int32 of each row's maximum; the last index where a row is NaN.

    Two plain reductions: jnp.argmax is one over pairs, into which XLA's CPU compiler pulls the
    noise and then computes it three times as slowly.
    """
    top_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(top_BV, _indices(x_BV), x_BV.shape[-1] - 1), axis=-1)


def _indices(x_BV: jax.Array) -> jax.Array:
    """Return [*B, V] int32, each entry's place in its row."""
    return jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, x_BV.ndim - 1)


def _at_least(logits_BV: jax.Array, border_B1: jax.Array) -> jax.Array:
    return jnp.where(logits_BV < border_B1, -jnp.inf, logits_BV)
