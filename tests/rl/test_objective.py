"""The training objective: its parts, and that no split of the batch changes it."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1re_jax.rl.kinds import KlKind, LossKind
from r1re_jax.rl.kl import kl_loss
from r1re_jax.rl.losses import policy_loss, token_weights
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.objective import LossSettings, metrics, objective

KINDS = [kind.value for kind in LossKind]
N, P, G, C = 2, 3, 2, 4


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, (N, P, G, C)).astype(np.float32)
    near = lambda: (logp + rng.normal(scale=0.4, size=logp.shape)).astype(np.float32)  # noqa: E731
    return {
        "logp_PGC": logp,
        "old_logp_PGC": near(),
        "ref_logp_PGC": near(),
        "advantage_PG": rng.normal(size=(N, P, G)).astype(np.float32),
        "mask_PGC": np.asarray(length_mask(rng.integers(0, C + 1, (N, P, G)), C)),
    }


def value_gradient_sums(
    arrays: dict[str, np.ndarray], settings: LossSettings
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    rest = {name: value for name, value in arrays.items() if name != "logp_PGC"}
    (value, sums), gradient = compiled(jnp.asarray(arrays["logp_PGC"]), rest, settings)
    return value, gradient, sums


@functools.partial(jax.jit, static_argnums=2)
def compiled(logp: jax.Array, rest: dict[str, jax.Array], settings: LossSettings) -> tuple:
    f = functools.partial(objective, **rest, settings=settings)
    return jax.value_and_grad(f, has_aux=True)(logp)


def with_weights(arrays: dict[str, np.ndarray], settings: LossSettings) -> dict[str, np.ndarray]:
    weight = token_weights(arrays["mask_PGC"], kind=settings.kind, length=settings.length)
    return arrays | {"weight_PGC": np.asarray(weight)}


@pytest.mark.parametrize("kind", KINDS)
def test_without_kl_it_is_the_policy_loss(kind: str) -> None:
    settings = LossSettings(kind=kind, clip_high=0.28, kl_coefficient=0.0, length=7)
    arrays = with_weights(batch(0), settings)
    names = ("logp_PGC", "old_logp_PGC", "advantage_PG", "mask_PGC")
    expected, aux = policy_loss(*(arrays[n] for n in names), kind=kind, clip_high=0.28, length=7)
    for ref in (arrays["ref_logp_PGC"], None):
        got, _, sums = value_gradient_sums(arrays | {"ref_logp_PGC": ref}, settings)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        means = metrics(sums)
        for name, value in aux.items():
            np.testing.assert_allclose(means[name], value, rtol=1e-5)
        assert ("kl" in means) == (ref is not None)


@pytest.mark.parametrize("kl_kind", list(KlKind))
def test_token_mean_adds_the_kl_loss(kl_kind: KlKind) -> None:
    settings = LossSettings(kind="token_mean", kl_coefficient=0.3, kl_kind=kl_kind)
    arrays = with_weights(batch(1), settings)
    logp, old, ref = (arrays[f"{n}_PGC"] for n in ("logp", "old_logp", "ref_logp"))
    policy, _ = policy_loss(
        logp, old, arrays["advantage_PG"], arrays["mask_PGC"], kind="token_mean"
    )
    kl = kl_loss(logp, ref, arrays["mask_PGC"], kind=kl_kind, old_logp_PGC=old)
    got, _, sums = value_gradient_sums(arrays, settings)
    np.testing.assert_allclose(got, policy + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(metrics(sums)["policy_loss"], policy, rtol=1e-5)
    np.testing.assert_allclose(metrics(sums)["kl_loss"], kl, rtol=1e-5)
    k3 = kl_loss(logp, ref, arrays["mask_PGC"], kind="k3")
    np.testing.assert_allclose(metrics(sums)["kl"], k3, rtol=1e-5)
    assert metrics(sums)["tokens"] == arrays["mask_PGC"].sum()


def test_kl_is_reduced_as_the_policy_loss_is() -> None:
    """With kind grpo the KL term is a mean over rows of token means, not a token mean."""
    settings = LossSettings(kind="grpo", kl_coefficient=1.0, kl_kind="k2")
    arrays = with_weights(batch(2), settings)
    mask = arrays["mask_PGC"]
    k2 = np.where(mask, (arrays["logp_PGC"] - arrays["ref_logp_PGC"]) ** 2 / 2, 0)
    expected = (k2.sum(-1) / np.maximum(mask.sum(-1), 1)).mean()
    _, _, sums = value_gradient_sums(arrays, settings)
    np.testing.assert_allclose(metrics(sums)["kl_loss"], expected, rtol=1e-5)
    assert not np.isclose(expected, k2.sum() / mask.sum(), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=20)
@hypothesis.given(seed=st.integers(0, 2**31), parts=st.sampled_from([3, 12]))
def test_micro_batches_add_up_whatever_their_size(kind: str, seed: int, parts: int) -> None:
    settings = LossSettings(kind=kind, kl_coefficient=0.1)
    whole = with_weights(batch(seed), settings)
    value, gradient, sums = value_gradient_sums(whole, settings)
    order = np.random.default_rng(seed).permutation(N * P * G)
    rows = {name: x.reshape(N * P * G, *x.shape[3:])[order] for name, x in whole.items()}
    pieces = []
    for index in np.split(np.arange(N * P * G), parts):
        pieces.append(value_gradient_sums({name: x[index] for name, x in rows.items()}, settings))
    np.testing.assert_allclose(sum(piece[0] for piece in pieces), value, rtol=1e-5, atol=1e-6)
    # A token's gradient does not depend on who shares its micro-batch, but for the last bit (how
    # the compiler groups the lanes of an exponential depends on the shape), of its terms before
    # policy and KL cancel.
    together = np.concatenate([piece[1] for piece in pieces])
    expected = np.asarray(gradient).reshape(-1, C)[order]
    np.testing.assert_allclose(together, expected, rtol=1e-6, atol=1e-7)
    added = jax.tree.map(lambda *xs: sum(xs), *(piece[2] for piece in pieces))
    for name, expected in metrics(sums).items():
        np.testing.assert_allclose(
            metrics(added)[name], expected, rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_nan_under_the_mask_reaches_nothing(kind: str) -> None:
    settings = LossSettings(kind=kind, kl_coefficient=0.1)
    arrays = with_weights(batch(3), settings)
    mask = arrays["mask_PGC"]
    dirty = {
        name: np.where(mask, x, np.nan)
        if name in ("logp_PGC", "old_logp_PGC", "ref_logp_PGC")
        else x
        for name, x in arrays.items()
    }
    dirty["weight_PGC"] = np.where(mask, arrays["weight_PGC"], np.nan)
    clean, got = value_gradient_sums(arrays, settings), value_gradient_sums(dirty, settings)
    jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_metrics_of_no_tokens_are_zero() -> None:
    arrays = batch(4) | {"mask_PGC": np.zeros((N, P, G, C), bool)}
    settings = LossSettings()
    value, gradient, sums = value_gradient_sums(with_weights(arrays, settings), settings)
    assert value == 0
    assert (gradient == 0).all()
    assert all(x == 0 for x in metrics(sums).values())


def test_settings_are_static_arguments_of_jit() -> None:
    settings = LossSettings(kind="cispo", clip_high=4.0)
    assert settings.kind is LossKind.CISPO
    assert settings.kl_kind is KlKind.K3_PLUS
    assert hash(settings) == hash(dataclasses.replace(settings))
    arrays = with_weights(batch(5), settings)
    logp = arrays.pop("logp_PGC")
    jitted = jax.jit(objective, static_argnames="settings")
    got, _ = jitted(logp, **arrays, settings=settings)
    expected, _ = objective(logp, **arrays, settings=settings)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "ppo"}, "unknown LossKind 'ppo'.*'grpo'"),
        ({"kl_kind": "k9"}, "unknown KlKind 'k9'.*'k3_plus'"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"clip_high": float("nan")}, "clip_high is nan"),
        ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0"),
        ({"length": 0}, "length is 0"),
    ],
)
def test_settings_without_meaning_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**setting)


def test_a_missing_reference_is_refused() -> None:
    settings = LossSettings()
    arrays = with_weights(batch(0), settings) | {"ref_logp_PGC": None}
    with pytest.raises(ValueError, match="kl_coefficient is 0.001 but there are no ref_logp"):
        objective(**arrays, settings=settings)
    arrays = with_weights(batch(0), settings)
    arrays["weight_PGC"] = arrays["weight_PGC"][:1]
    with pytest.raises(ValueError, match="weight has shape"):
        objective(**arrays, settings=settings)
