"""Importance weights against plain Python, their figures, and what they do to the loss."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.correction import (
    LOGP_DIFFERENCE,
    chosen,
    correction_metrics,
    correction_sums,
    importance_weights,
    longest_quarter,
)
from r1re_jax.rl.kinds import CorrectionKind, LossKind
from r1re_jax.rl.losses import token_policy_loss, token_weights
from r1re_jax.rl.objective import LossSettings, objective

KINDS = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
P, G, C = 2, 3, 5


def batch(seed: int, *, scale: float = 0.8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old and sampler log-probabilities whose ratios lie on both sides of 3; ragged, one empty."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.5, (P, G, C)).astype(np.float32)
    sampler = (old + rng.normal(scale=scale, size=old.shape)).astype(np.float32)
    length = rng.integers(1, C + 1, (P, G))
    length[0, 0] = 0
    return old, sampler, np.arange(C) < length[..., None]


def by_hand(
    old: np.ndarray, sampler: np.ndarray, mask: np.ndarray, kind: str, limit: float
) -> np.ndarray:
    out = np.zeros(old.shape)
    for p, g in np.ndindex(P, G):
        tokens = [t for t in range(C) if mask[p, g, t]]
        ratios = {t: math.exp(float(old[p, g, t]) - float(sampler[p, g, t])) for t in tokens}
        row = math.prod(ratios.values())
        for t in tokens:
            ratio = row if kind.startswith("sequence") else ratios[t]
            if kind == "none":
                out[p, g, t] = 1
            elif kind.endswith("truncate"):
                out[p, g, t] = min(ratio, limit)
            else:
                out[p, g, t] = 0 if ratio > limit else ratio
    return out


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**31), limit=st.sampled_from([1.0, 2.0, 3.0]))
def test_weights_by_hand(kind: str, seed: int, limit: float) -> None:
    arrays = batch(seed)
    got = importance_weights(*arrays, kind=kind, limit=limit)
    expected = by_hand(*arrays, kind, limit)
    near = np.isclose(np.exp(np.abs(np.log(np.where(expected > 0, expected, 1)))), limit)
    np.testing.assert_allclose(np.where(near, 0, got), np.where(near, 0, expected), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_it_is_unbiased_where_nothing_is_cut(kind: str) -> None:
    """E_sampler[w · f] = E_old[f] over all rows of two tokens from three, enumerated."""
    rng = np.random.default_rng(0)
    old, sampler = (np.log(rng.dirichlet(np.ones(3), size=2)) for _ in range(2))
    rows = [(a, b) for a in range(3) for b in range(3)]
    value = rng.normal(size=len(rows))
    logp = [np.array([[[one[0, a], one[1, b]]] for a, b in rows]) for one in (old, sampler)]
    weight = np.asarray(
        importance_weights(*logp, np.ones((len(rows), 1, 2)), kind=kind, limit=1e6)
    )[:, 0]
    drawn = np.exp(logp[1].sum(-1))[:, 0]
    wanted = np.exp(logp[0].sum(-1))[:, 0]
    if kind.startswith("sequence"):
        np.testing.assert_allclose(
            (drawn * weight[:, 0] * value).sum(), (wanted * value).sum(), rtol=1e-5
        )
    else:  # a token's own ratio: right for what depends on that token
        for place in range(2):
            marks = np.array([row[place] == 1 for row in rows])
            got = (drawn * weight[:, place] * marks).sum()
            np.testing.assert_allclose(got, np.exp(old[place, 1]), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_where_both_agree_all_weights_are_one(kind: str) -> None:
    old, _, mask = batch(1)
    weight = importance_weights(old, old, mask, kind=kind, limit=3.0)
    np.testing.assert_array_equal(weight, mask.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_under_the_mask_is_read_and_overflow_is_cut(kind: str) -> None:
    old, sampler, mask = batch(2)
    clean = importance_weights(old, sampler, mask, kind=kind, limit=3.0)
    dirty = [np.where(mask, x, np.nan) for x in (old, sampler)]
    np.testing.assert_array_equal(importance_weights(*dirty, mask, kind=kind, limit=3.0), clean)
    far = importance_weights(old, old - 1000, mask, kind=kind, limit=3.0)
    assert np.isfinite(far).all()
    sums = correction_sums(old, old - 1000, mask)
    assert all(np.isfinite(value) for value in sums.values())


def test_only_large_ratios_are_masked() -> None:
    old = np.log(np.array([[[0.5, 0.5], [0.1, 0.1], [0.5, 0.5]]]))
    sampler = np.log(np.array([[[0.25, 0.5], [0.5, 0.5], [0.2, 0.25]]]))
    mask = np.ones((1, 3, 2), bool)
    weight = importance_weights(old, sampler, mask, kind="sequence_mask", limit=3.0)
    np.testing.assert_allclose(weight[0, :, 0], [2.0, 0.04, 0.0], rtol=1e-5)


def test_figures_by_hand() -> None:
    old, sampler, mask = batch(3)
    for kind in KINDS:
        weight = (
            None if kind == "none" else importance_weights(old, sampler, mask, kind=kind, limit=3.0)
        )
        parts = [
            correction_sums(
                *(x[p] for x in (old, sampler, mask)),
                weight_PGC=None if weight is None else weight[p],
            )
            for p in range(P)
        ]
        sums = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
        got = correction_metrics(sums | {"tokens": float(mask.sum())})
        gap = (old - sampler)[mask].astype(np.float64)
        np.testing.assert_allclose(got["sampling/kl"], (np.exp(gap) - 1 - gap).mean(), rtol=1e-4)
        w = np.exp(gap) if weight is None else np.asarray(weight)[mask]
        np.testing.assert_allclose(
            got["sampling/ess"], w.sum() ** 2 / (w**2).sum() / w.size, rtol=1e-4
        )
        np.testing.assert_allclose(got["sampling/masked"], (w == 0).mean(), rtol=1e-5)
    assert (
        correction_metrics({**sums, "importance_squared": 0.0, "tokens": 0.0})["sampling/ess"] == 0
    )


def test_long_rows_are_reported_by_themselves() -> None:
    old, sampler, mask = batch(3)
    weight = importance_weights(old, sampler, mask, kind="token_mask", limit=1.5)
    long = longest_quarter(mask.sum(-1))
    parts = [
        correction_sums(
            *(x[p] for x in (old, sampler, mask)), weight_PGC=weight[p], long_PG=long[p]
        )
        for p in range(P)
    ]
    sums = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    got = correction_metrics(sums | {"tokens": float(mask.sum())})
    of_long = np.where(mask & long[..., None])
    assert 0 < of_long[0].size < mask.sum()
    gap = np.abs(old - sampler)[of_long].astype(np.float64)
    np.testing.assert_allclose(got[f"{LOGP_DIFFERENCE}/mean_long"], gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        got["sampling/masked_long"], (np.asarray(weight)[of_long] == 0).mean(), rtol=1e-6
    )
    assert 0 < got["sampling/masked_long"] < 1
    nothing = correction_sums(old, sampler, mask, long_PG=np.zeros((P, G), bool))
    sums = {name: float(value) for name, value in nothing.items()} | {"tokens": 1.0}
    found = correction_metrics(sums)
    assert found["sampling/masked_long"] == found[f"{LOGP_DIFFERENCE}/mean_long"] == 0


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ([[1, 2], [3, 4]], [[0, 0], [0, 1]]),
        ([[4, 1, 4], [4, 2, 3]], [[1, 0, 1], [1, 0, 0]]),  # equals are not told apart
        ([[5, 5], [5, 5]], [[1, 1], [1, 1]]),
        ([[1, 2, 3, 4, 5]], [[0, 0, 0, 1, 1]]),  # a quarter is rounded up
        ([[0]], [[1]]),
    ],
)
def test_the_longest_quarter(length: list, expected: list) -> None:
    np.testing.assert_array_equal(longest_quarter(np.array(length)), np.array(expected, bool))


def test_the_estimate_is_of_kl_sampler_to_trainer() -> None:
    """Its expectation over the sampler's draws is KL(sampler‖trainer), enumerated."""
    rng = np.random.default_rng(4)
    trainer, sampler = rng.dirichlet(np.ones(6), size=2)
    each = [
        float(correction_sums(*np.log([[[[t]]], [[[s]]]]), np.ones((1, 1, 1)))["sampler_kl"])
        for t, s in zip(trainer, sampler, strict=True)
    ]
    expected = (sampler * np.log(sampler / trainer)).sum()
    np.testing.assert_allclose((sampler * each).sum(), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind.value for kind in LossKind])
def test_the_objective_multiplies_the_policy_loss_alone(kind: str) -> None:
    old, sampler, mask = batch(5)
    rng = np.random.default_rng(5)
    advantage = rng.normal(size=(P, G)).astype(np.float32)
    weight = np.asarray(token_weights(mask, kind=kind))
    importance = importance_weights(old, sampler, mask, kind="token_truncate", limit=2.0)
    shared = {"old_logp_PGC": old, "ref_logp_PGC": old - 0.3, "advantage_PG": advantage}
    shared |= {"mask_PGC": mask, "weight_PGC": weight}
    settings = LossSettings(kind=kind, kl_coefficient=0.5)

    def f(logp: jax.Array, importance: np.ndarray | None) -> tuple:
        return objective(logp, **shared, settings=settings, importance_PGC=importance)

    both = [jax.value_and_grad(f, has_aux=True)(jnp.asarray(old), w) for w in (None, importance)]
    ((_, plain), slope), ((_, sums), gradient) = both
    token, _ = token_policy_loss(old, old, advantage, mask, kind=kind)
    np.testing.assert_allclose(sums["policy_loss"], (weight * importance * token).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["kl_loss"], plain["kl_loss"], rtol=1e-6)
    if kind != "gspo":  # there a token's gradient is that of its row
        change = -(np.asarray(importance) - 1) * weight * advantage[..., None]
        np.testing.assert_allclose(gradient - slope, np.where(mask, change, 0), atol=1e-6)


def test_auto_corrects_where_the_sampler_differs() -> None:
    assert chosen("auto", sampler_differs=False) is CorrectionKind.NONE
    assert chosen("auto", sampler_differs=True) is CorrectionKind.SEQUENCE_MASK
    assert chosen("token_mask", sampler_differs=False) is CorrectionKind.TOKEN_MASK
    assert chosen("none", sampler_differs=True) is CorrectionKind.NONE


def test_what_does_not_fit_is_refused() -> None:
    old, sampler, mask = batch(0)
    with pytest.raises(ValueError, match="resolve it with `chosen`"):
        importance_weights(old, sampler, mask, kind="auto", limit=3.0)
    with pytest.raises(ValueError, match="unknown CorrectionKind 'tis'"):
        importance_weights(old, sampler, mask, kind="tis", limit=3.0)
    with pytest.raises(ValueError, match="sampler_logp has shape"):
        importance_weights(old, sampler[..., :-1], mask, kind="none", limit=3.0)
