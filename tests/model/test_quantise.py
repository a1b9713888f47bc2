"""Int8 numbers against NumPy, and models that compute from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from r1re_jax.model.attention import attend
from r1re_jax.model.config import Family
from r1re_jax.model.int8 import Int8, Quantisation, stored_as
from r1re_jax.model.lora import Lora, adapt
from r1re_jax.model.parts import Part
from r1re_jax.model.quantise import matrix_names, quantise
from r1re_jax.model.qwen import Cache, Qwen
from r1re_jax.train.state import flat_params, model_state
from tests.quantised import MATRICES, by_hand, dequantised, quantised
from tests.tiny import tiny_model


@functools.partial(jax.jit, static_argnames=("axis", "dtype"))
def made(x: jax.Array, *, axis: int, dtype: str) -> Int8:
    """The code under test, compiled as it is used."""
    return Int8.of(x, axis=axis, dtype=jnp.dtype(dtype))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    axis=st.sampled_from([-1, -2]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    size=st.integers(-30, 30),
)
def test_no_number_moves_by_more_than_half_a_scale(
    seed: int, axis: int, dtype: str, size: int
) -> None:
    """Whatever the scale is rounded to."""
    x = (np.random.default_rng(seed).standard_t(2, (3, 7, 5)) * 2.0**size).astype(np.float32)
    x[0, :, 2] = x[1, 3] = 0
    found = made(jnp.asarray(x), axis=axis, dtype=dtype)
    assert found.value.dtype == jnp.int8 and found.scale.dtype == found.dtype == dtype
    assert found.shape == x.shape and (found.ndim, found.size) == (x.ndim, x.size)
    assert found.scale.shape == tuple(1 if i == 3 + axis else n for i, n in enumerate(x.shape))
    value, scale = (np.asarray(part, np.float64) for part in (found.value, found.scale))
    assert np.abs(value).max() <= 127
    # Division in float32 may round what lies halfway between two numbers to the farther one.
    assert (np.abs(value * scale - x) <= scale * (0.5 + 1e-4)).all()
    assert (value[x == 0] == 0).all()


def test_numbers_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    for axis in (-1, -2):
        number, scale = by_hand(x, axis)
        found = made(jnp.asarray(x), axis=axis, dtype="float32")
        np.testing.assert_array_equal(found.value, number)
        np.testing.assert_allclose(found.scale, scale, rtol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    x = jnp.array([[1.0, np.nan], [1.0, 2.0]])
    found = made(x, axis=-1, dtype="float32")
    assert np.isnan(found.scale[0]).all() and np.isfinite(found.scale[1]).all()


def test_only_the_layers_matrices_are_quantised() -> None:
    model = tiny_model()
    assert sorted(matrix_names(model)) == sorted(MATRICES)
    before = flat_params(nnx.state(model))
    after = flat_params(nnx.state(quantised(model, weights="int8")))
    assert {name for name in after if after[name].dtype == jnp.int8} == set(MATRICES)
    scales = {name.replace("weight", "scale") for name in MATRICES}
    assert after.keys() - before.keys() == scales
    for name in MATRICES:
        assert after[name.replace("weight", "scale")].shape == (2, before[name].shape[-1])
    assert all(after[name] is before[name] for name in before.keys() - set(MATRICES))


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = tiny_model()
    graph, _ = nnx.split(model)
    for weights, cache in (("int8", "none"), ("none", "int8")):
        other = quantise(model, weights=Quantisation(weights), cache=Quantisation(cache))
        assert nnx.split(other)[0] != graph == nnx.split(model)[0]
    same = quantise(model, weights=Quantisation.NONE, cache=Quantisation.NONE)
    assert same.cache is Quantisation.NONE and same.empty_cache((1,), 2).key[0].dtype == jnp.float32


def forward(model: Qwen) -> tuple[jax.Array, jax.Array]:
    """Logits of two rows below a guide, and of three tokens decoded below it."""
    start = jnp.zeros(1, jnp.int32)
    _, own = model.extend(jnp.array([[1, 2, 3, 4]]), start=start)
    guide = Cache(own.key, own.value, jnp.array([3]))
    rows, start = jnp.array([[[5, 6, 9], [7, 8, 2]]]), jnp.full((1, 2), 3)
    below, _ = model.extend(rows, start=start, ancestors=(guide,))
    own, hidden = model.empty_cache((1, 2), 4), []
    for step in range(3):
        one, own = model.decode(
            rows[..., step], step=jnp.int32(step), start=start, ancestors=(guide,), own=own
        )
        hidden.append(one)
    return model.logits(below), model.logits(jnp.stack(hidden, -2))


@pytest.mark.parametrize("family", [Family.QWEN2, Family.QWEN3])
def test_int8_weights_compute_what_their_numbers_say(family: Family) -> None:
    plain = tiny_model(family=family)
    found = nnx.jit(forward)(quantised(plain, weights="int8"))
    expected = nnx.jit(forward)(dequantised(plain))
    for ours, exact, before in zip(found, expected, nnx.jit(forward)(plain), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=2e-5)
        assert np.abs(ours - before).max() > 1e-3, "it rounds"


def test_bfloat16_multiplies_int8() -> None:
    """A scale that is rounded beforehand leaves the error of the forward alone."""
    plain = tiny_model(dtype="bfloat16")
    found = nnx.jit(forward)(quantised(plain, weights="int8"))
    exact = nnx.jit(forward)(dequantised(tiny_model()))
    coarse = nnx.jit(forward)(dequantised(plain))
    for ours, expected, usual in zip(found, exact, coarse, strict=True):
        error, rounding = (np.abs(x - expected).mean() for x in (ours, usual))
        assert error < 1.5 * rounding + 1e-2


def test_an_adapter_stays_as_it_is_beside_int8() -> None:
    plain, random = tiny_model(), np.random.default_rng(3)

    def adapted(base: Qwen) -> Qwen:
        """The base with the same adapter."""
        model = adapt(base, Lora(rank=2, alpha=4.0))
        params = flat_params(nnx.state(base))
        for name, shape in flat_params(nnx.state(model)).items():
            if name not in params:
                params[name] = jnp.asarray(random.normal(0, 0.3, shape.shape), jnp.float32)
        return nnx.merge(nnx.split(model)[0], model_state(params))

    before = adapted(plain)
    random = np.random.default_rng(3)
    exact = adapted(dequantised(plain))
    found = quantised(before, weights="int8")
    assert "layers.up.adapter.a" in flat_params(nnx.state(found))
    for ours, expected in zip(nnx.jit(forward)(found), nnx.jit(forward)(exact), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)


def test_attention_over_int8_is_that_over_its_numbers() -> None:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    query, key, value = draw(2, 3, 4, 8), draw(2, 2, 8, 6), draw(2, 2, 6, 8)
    length = jnp.array([4, 6])
    own = Part(draw(2, 2, 8, 3), draw(2, 2, 3, 8))
    key, value = (made(x, axis=a, dtype="float32") for x, a in ((key, -2), (value, -1)))
    numbers = (x.value.astype(jnp.float32) * x.scale for x in (key, value))
    found = jax.jit(attend)(query, [Part(key, value, length), own])
    expected = jax.jit(attend)(query, [Part(*numbers, length), own])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_int8_cache_holds_what_was_written() -> None:
    model = quantised(tiny_model(), cache="int8")
    own = model.empty_cache((1, 2), 4)
    assert all(isinstance(x, Int8) and x.shape == (2, 1, 2, 8, 4) for x in own.key)
    assert all(isinstance(x, Int8) and x.shape == (2, 1, 2, 4, 8) for x in own.value)
    assert own.key[0].scale.shape == (2, 1, 2, 1, 4), "a scale for each token and head"
    assert own.value[0].scale.shape == (2, 1, 2, 4, 1), "a scale for each token and head"
    new = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 2, 1, 8)), jnp.float32)
    written = stored_as(own.value[0], new, axis=-1)
    np.testing.assert_array_equal(written.value, made(new, axis=-1, dtype="float32").value)
    assert stored_as(jnp.zeros(1, jnp.bfloat16), new, axis=-1).dtype == jnp.bfloat16


def test_an_int8_cache_is_close_to_a_float_one() -> None:
    """Keys and values move by 1/254 of their largest number at most."""
    plain = tiny_model()
    models = quantised(plain, cache="int8"), plain
    decoded, exact = (nnx.jit(lambda model: forward(model)[1])(model) for model in models)
    assert 1e-5 < np.abs(decoded - exact).max() < 0.05
    scores = [nnx.jit(lambda model: forward(model)[0])(model) for model in models]
    np.testing.assert_array_equal(*scores, err_msg="scores have no cache")
