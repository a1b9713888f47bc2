"""Rollouts that draw from int8: they do what its numbers say, and the same in any batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.int8 import Int8, Quantisation
from r1re_jax.model.quantise import quantise
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rollout import decode, shapes
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Rollout, generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.train.state import flat_params, model_layout, model_state, place_params
from tests.oracles import flat_qwen
from tests.quantised import dequantised, quantised
from tests.tiny import random_level, tiny_model

N, P, G, S, Q, C = 2, 4, 4, 7, 5, 28
STOPS, PAD = (3, 17, 20), 3
MODEL = tiny_model()
KINDS = [("int8", "none"), ("none", "int8"), ("int8", "int8")]
# A key whose rounding another batch shape moves over an edge is another int8.
EDGE = 2e-3


@functools.cache
def levels() -> tuple[Level, Level]:
    random = np.random.default_rng(0)
    return random_level(random, (N, S)), random_level(random, (N, P, Q), least=1)


def draw(model: Qwen, **more: object) -> Rollout:
    ids = example_ids("d", [str(i) for i in range(N * P)]).reshape(N, P, 2)
    given = {"keys": row_keys(0, Purpose.TRAIN, 1, ids, range(G)), "chunk": 5, **more}
    settings = SamplingSettings()
    rollout = generate(
        *nnx.split(model), levels(), settings=settings, limit=C, stop_ids=STOPS, pad_id=PAD, **given
    )
    return jax.device_get(rollout)


@functools.cache
def usual(weights: str, cache: str) -> Rollout:
    return draw(quantised(MODEL, weights=weights, cache=cache))


def assert_same_samples(found: Rollout, expected: Rollout, *, atol: float) -> None:
    for name in ("tokens", "length", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.logp, expected.logp, atol=atol)


def gaps(rollout: Rollout, of: Qwen) -> np.ndarray:
    """Differences of the drawn tokens' log-probabilities to a plain float64 forward's."""
    params = flat_qwen.parameters(of)
    tree = Tree(*levels(), Level(rollout.tokens, rollout.length))
    with jax.enable_x64(True):
        score = jax.jit(lambda params: flat_qwen.flat_scores(params, of.config, tree)[0])
        logp = np.asarray(score(params))
    return np.abs(rollout.logp - logp)[np.arange(C) < rollout.length[..., None]]


def test_int8_weights_draw_what_their_numbers_draw() -> None:
    model = dequantised(MODEL)
    assert_same_samples(usual("int8", "none"), draw(model), atol=2e-5)
    assert gaps(usual("int8", "none"), model).max() < 2e-5
    assert gaps(usual("int8", "none"), MODEL).max() > 1e-3, "they are other numbers"


def test_an_int8_cache_draws_close_to_a_float_one() -> None:
    for weights, model in (("none", MODEL), ("int8", dequantised(MODEL))):
        gap = gaps(usual(weights, "int8"), model)
        assert 1e-5 < gap.mean() < 3e-3 and gap.max() < 3e-2, (gap.mean(), gap.max())


@pytest.mark.parametrize(("weights", "cache"), KINDS[1:])
def test_compaction_changes_no_sample(
    weights: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales go with their rows, and the cache grows with its scales."""
    seen: list[tuple[int, ...]] = []
    whole = decode.decode_chunk

    def counted(graph: object, params: object, state: decode.DecodeState, *a: object, **k: object):
        value = state.past.value[0]
        assert isinstance(value, Int8) and value.scale.shape == (*value.shape[:-1], 1)
        seen.append((*state.done.shape, value.shape[-2]))
        return whole(graph, params, state, *a, **k)

    expected = usual(weights, cache)
    monkeypatch.setattr(decode, "decode_chunk", counted)
    monkeypatch.setattr(shapes, "NARROWEST", 8)
    found = draw(quantised(MODEL, weights=weights, cache=cache), chunk=3, compaction=2)
    assert_same_samples(found, expected, atol=EDGE)
    assert len({shape[1] * shape[2] for shape in seen}) > 1, "rows were dropped"
    assert [*dict.fromkeys(shape[-1] for shape in seen)] == [8, 16, 32], "the cache grew"


def test_chunks_change_no_sample() -> None:
    found = draw(quantised(MODEL, weights="int8", cache="int8"), chunk=100)
    assert_same_samples(found, usual("int8", "int8"), atol=0)


def test_a_mesh_changes_no_sample() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = quantised(MODEL, weights="int8", cache="int8")
    both = quantise(MODEL, weights=Quantisation.INT8, cache=Quantisation.INT8)
    layout = model_layout(both, mesh)
    placed = place_params(flat_params(nnx.state(model)), layout)
    for name, spec in (("query", (None, "tensor")), ("down", (None, "fsdp"))):
        where = placed[f"layers.{name}.scale"].sharding.spec
        assert tuple(x[0] if isinstance(x, tuple) else x for x in where) == spec
    graph, _ = nnx.split(model)
    spread = nnx.merge(graph, model_state(placed))
    assert_same_samples(draw(spread, mesh=mesh), usual("int8", "int8"), atol=EDGE)


def test_the_caches_bytes_are_those_of_int8_and_scales() -> None:
    """Half of bfloat16's, and a scale for each token and head."""
    sizes = {}
    for cache in ("none", "int8"):
        model = quantised(tiny_model(dtype="bfloat16"), cache=cache)
        leaves = jax.tree.leaves(model.empty_cache((N, P, G), C))
        sizes[cache] = sum(x.size * x.dtype.itemsize for x in leaves)
        assert all(x.dtype in (jnp.int8, jnp.bfloat16) for x in leaves)
    size = MODEL.config.head_size
    assert sizes["int8"] * 2 * size == sizes["none"] * (size + 2)
