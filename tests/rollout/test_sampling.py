import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from r1re_jax.rollout.sampling import SamplingSettings, filter_logits, sample

SETTINGS = st.builds(
    SamplingSettings,
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
)


def logits_of(seed: int, *shape: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def keys_of(seed: int, *shape: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), shape)


def kept_oracle(logits: np.ndarray, settings: SamplingSettings) -> set[int]:
    """The tokens of one row that may be drawn, filter by filter on a list sorted by probability."""
    order = np.argsort(-logits)
    kept = list(order[: settings.top_k] if settings.top_k else order)
    weight = np.exp(logits.astype(np.float64) - logits.max())
    if settings.top_p < 1:
        share = weight[kept] / weight[kept].sum()
        enough = next(
            n for n in range(1, len(kept) + 1) if share[:n].sum() >= settings.top_p - 1e-6
        )
        kept = kept[:enough]
    return {int(token) for token in kept if weight[token] >= settings.min_p * weight[kept[0]]}


def near_border(logits: np.ndarray, settings: SamplingSettings) -> bool:
    """Whether fp32 and float64 may disagree on a token at the edge of a filter."""
    weight = np.sort(np.exp(logits.astype(np.float64) - logits.max()))[::-1]
    some = weight[: settings.top_k or None]
    top_p = np.abs(np.cumsum(some / some.sum()) - settings.top_p).min() < 1e-5
    return top_p or np.abs(weight - settings.min_p).min() < 1e-5


@hypothesis.given(seed=st.integers(0, 10_000), settings=SETTINGS)
@hypothesis.settings(deadline=None, max_examples=60)
def test_filters_keep_what_the_oracle_keeps(seed: int, settings: SamplingSettings) -> None:
    logits_BV = logits_of(seed, 3, 11)
    hypothesis.assume(not any(near_border(row, settings) for row in logits_BV))
    filtered_BV = np.asarray(filter_logits(jnp.asarray(logits_BV), settings))
    for row, filtered in zip(logits_BV, filtered_BV, strict=True):
        kept = kept_oracle(row, settings)
        assert {int(v) for v in np.flatnonzero(np.isfinite(filtered))} == kept
        assert all(filtered[v] == row[v] for v in kept)


def test_filters_keep_tokens_that_tie() -> None:
    logits_V = jnp.array([2.0, 1.0, 1.0, 0.0])
    assert np.isfinite(filter_logits(logits_V, SamplingSettings(top_k=2))).tolist() == [1, 1, 1, 0]
    assert np.isfinite(filter_logits(logits_V, SamplingSettings(top_p=0.7))).tolist() == [
        1,
        1,
        1,
        0,
    ]


def test_no_filter_computes_nothing() -> None:
    program = jax.make_jaxpr(lambda x: filter_logits(x, SamplingSettings()))(jnp.zeros((2, 8)))
    assert not program.eqns


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(temperature=0.5),
        SamplingSettings(temperature=2.0, top_k=5),
        SamplingSettings(temperature=3.0, top_p=0.8, min_p=0.05),
    ],
)
def test_draws_follow_the_distribution(settings: SamplingSettings) -> None:
    draws, vocab = 20_000, 9
    logits_V = logits_of(3, vocab)
    keys = keys_of(7, draws)
    tokens, _ = jax.jit(sample, static_argnums=2)(
        jnp.broadcast_to(logits_V, (draws, vocab)), keys, settings
    )
    scaled = logits_V.astype(np.float64) / settings.temperature
    kept = sorted(kept_oracle(scaled, settings))
    assert len(kept) > 1  # else there is nothing to draw
    expected = np.exp(scaled[kept] - scaled[kept].max())
    expected *= draws / expected.sum()
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert counts[kept].sum() == draws
    assert scipy.stats.chisquare(counts[kept], expected).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
def test_logp_is_of_the_whole_softmax_at_the_temperature(temperature: float) -> None:
    settings = SamplingSettings(temperature=temperature, top_k=3, top_p=0.9)
    logits_BV = logits_of(1, 4, 5, 50)
    tokens, logp = sample(jnp.asarray(logits_BV), keys_of(0, 4, 5), settings)
    scaled = logits_BV.astype(np.float64) / (temperature or 1.0)
    whole = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    chosen = np.take_along_axis(whole, np.asarray(tokens)[..., None], -1)[..., 0]
    assert logp.dtype == jnp.float32 and tokens.dtype == jnp.int32
    np.testing.assert_allclose(logp, chosen, atol=2e-6)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits_BV = jnp.array([[0.0, 4.0, 4.0], [1.0, 0.0, -5.0]])
    tokens, _ = sample(logits_BV, keys_of(0, 2), SamplingSettings(temperature=0.0, top_k=1))
    assert tokens.tolist() == [1, 0]


def test_nan_logits_give_a_token_of_the_vocabulary_and_a_logp_that_shows() -> None:
    tokens, logp = sample(jnp.full((1, 5), jnp.nan), keys_of(0, 1), SamplingSettings())
    assert 0 <= int(tokens[0]) < 5 and np.isnan(logp[0])


def test_a_row_depends_on_its_own_key_and_logits_alone() -> None:
    logits_BV, keys = jnp.asarray(logits_of(2, 6, 30)), keys_of(4, 6)
    settings = SamplingSettings(top_p=0.9)
    together, _ = sample(logits_BV, keys, settings)
    for i in range(6):
        alone, _ = sample(logits_BV[i], keys[i], settings)
        assert int(alone) == int(together[i])


def test_filters_agree_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    settings = SamplingSettings(temperature=0.8, top_k=20, top_p=0.85, min_p=0.03)
    logits_BV = logits_of(9, 64, 100)
    scores = torch.tensor(logits_BV)
    for warp in (
        process.TemperatureLogitsWarper(settings.temperature),
        process.TopKLogitsWarper(settings.top_k),
        process.TopPLogitsWarper(settings.top_p),
        process.MinPLogitsWarper(settings.min_p),
    ):
        scores = warp(None, scores)
    ours = filter_logits(jnp.asarray(logits_BV) / settings.temperature, settings)
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(min_p=2.0),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_settings_know_whether_they_filter() -> None:
    assert not SamplingSettings(temperature=0.5).filters
    assert not SamplingSettings(temperature=0.0, top_k=3).filters
    assert SamplingSettings(min_p=0.1).filters and SamplingSettings(top_k=1).filters
