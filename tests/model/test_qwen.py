"""The network's pieces against formulas, and its two ways of computing against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from r1re_jax.model.block import RMSNorm, rotary, rotation
from r1re_jax.model.qwen import Cache, KeyValue, Qwen, Remat, abstract_qwen
from tests.drawn import drawn_model, small_config

N, P, G, S, Q, C = 2, 3, 2, 5, 4, 3


@given(seed=st.integers(0, 2**31), theta=st.sampled_from([1e2, 1e4, 1e6]))
@settings(max_examples=10)
def test_rotary_is_a_complex_rotation(seed: int, theta: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 2, 8)).astype(np.float32)
    position = rng.integers(0, 30_000, size=(2, 3)).astype(np.int32)
    frequency = theta ** (-2 * np.arange(4) / 8)
    angle = position[..., None, None] * frequency
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    # Positions times frequencies are fp32: at 30,000 an angle is exact to 2e-3.
    np.testing.assert_allclose(rotary(x, rotation(position, frequency)), expected, atol=1e-2)


def test_rotary_makes_scores_relative() -> None:
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    frequency = 1e4 ** (-np.arange(8) / 8)

    def score(at: int, other: int) -> float:
        turn = lambda x, t: rotary(x, rotation(np.full((1, 1), t, np.int32), frequency))  # noqa: E731
        return float((turn(query, at) * turn(key, other)).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert score(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-6)
    assert score(7, 3) != pytest.approx(score(3, 7), abs=1e-3)


def test_rmsnorm() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 5, 8)), rng.normal(size=8)
    norm = RMSNorm(8, eps=0.1)
    norm.weight[...] = weight.astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * weight
    np.testing.assert_allclose(norm(x.astype(np.float32)), expected, rtol=1e-5, atol=1e-6)


def test_layers_are_stacked_and_drawn_apart() -> None:
    model = Qwen(small_config(layers=3), rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model.layers)):
        value = np.asarray(leaf.get_value())
        assert value.shape[0] == 3, path
        # Flax's own axis bookkeeping leaves our names alone: they are those of one layer.
        assert len(leaf.get_metadata("logical_axes")) == value.ndim - 1, path
        if value.ndim == 3:
            assert len({float(layer.sum()) for layer in value}) == 3, path
            assert value[0].std() == pytest.approx(value[1].std(), rel=0.3), path


@pytest.mark.parametrize("tied", [True, False])
def test_random_model_starts_near_the_uniform_distribution(tied: bool) -> None:
    model = Qwen(small_config(tied=tied, width=48), rngs=nnx.Rngs(0))
    hidden, _ = model.extend(np.arange(16)[None], start=jnp.zeros(1, jnp.int32))
    logits = model.logits(hidden)
    assert logits.shape == (1, 16, 61)
    assert 0.5 < float(logits.std()) < 2


@pytest.mark.parametrize("tied", [True, False])
def test_abstract_model_has_the_structure_and_no_arrays(tied: bool) -> None:
    config = small_config(tied=tied)
    abstract = abstract_qwen(config, dtype="bfloat16", remat=Remat.LAYER)
    real = Qwen(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat=Remat.LAYER)
    assert nnx.graphdef(abstract) == nnx.graphdef(real)
    leaves = jax.tree.leaves(nnx.state(abstract))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(real))]
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == shapes


def ragged_rows() -> dict[str, np.ndarray]:
    """Make tokens of all three levels with their lengths and starts."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, 61, shape).astype(np.int32)  # noqa: E731
    guide_length = np.array([S, S - 2], np.int32)
    question_length = rng.integers(1, Q + 1, (N, P)).astype(np.int32)
    question_start = np.repeat(guide_length[:, None], P, 1)
    return dict(
        guide=draw(N, S),
        guide_length=guide_length,
        question=draw(N, P, Q),
        question_length=question_length,
        question_start=question_start,
        completion=draw(N, P, G, C),
        completion_start=np.repeat((question_start + question_length)[..., None], G, 2),
    )


def cache(level: KeyValue, length: np.ndarray) -> Cache:
    """Make a level ready for those below it."""
    return Cache(level.key, level.value, jnp.asarray(length))


def above(model: Qwen, rows: dict[str, np.ndarray]) -> tuple[Cache, Cache]:
    """Compute the caches of guides and questions."""
    _, level = model.extend(rows["guide"], start=jnp.zeros(N, jnp.int32))
    guide = cache(level, rows["guide_length"])
    start = rows["question_start"]
    _, level = model.extend(rows["question"], start=start, ancestors=(guide,))
    return guide, cache(level, rows["question_length"])


def completed(model: Qwen, rows: dict[str, np.ndarray]) -> jax.Array:
    """Compute the completions' hidden states [N, P, G, C, D] by extend, three times."""
    ancestors = above(model, rows)
    start = rows["completion_start"]
    return model.extend(rows["completion"], start=start, ancestors=ancestors)[0]


@nnx.jit
def forward(model: Qwen, rows: dict[str, np.ndarray]) -> tuple[jax.Array, nnx.State]:
    """Return the hidden states, and the gradient of a nonlinear function of them all."""
    graph, params = nnx.split(model)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        hidden = completed(nnx.merge(graph, params), rows)
        return jnp.sin(hidden.astype(jnp.float32)).sum(), hidden

    gradient, hidden = jax.grad(loss, has_aux=True)(params)
    return hidden, gradient


@nnx.jit
def decoded(model: Qwen, rows: dict[str, np.ndarray], own: KeyValue) -> tuple[jax.Array, KeyValue]:
    """Compute the same hidden states by decode, token by token."""
    ancestors = above(model, rows)
    hidden = []
    for step in range(C):
        one, own = model.decode(
            rows["completion"][..., step],
            step=jnp.int32(step),
            start=rows["completion_start"],
            ancestors=ancestors,
            own=own,
        )
        hidden.append(one)
    return jnp.stack(hidden, -2), own


@pytest.fixture(scope="module")
def model() -> Qwen:
    """Return two layers of random weights."""
    return drawn_model(small_config())


def test_decode_equals_extend_whatever_the_free_slots_hold(model: Qwen) -> None:
    rows = ragged_rows()
    expected, _ = forward(model, rows)
    for filling in (0.0, 1e4):
        empty = model.empty_cache((N, P, G), C + 2)
        assert [layer.shape for layer in empty.key] == [(2, N, P, G, 6, C + 2)] * 2
        assert [layer.shape for layer in empty.value] == [(2, N, P, G, C + 2, 6)] * 2
        own = jax.tree.map(lambda x, f=filling: np.full(x.shape, f, np.float32), empty)
        found, own = decoded(model, rows, own)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        for layer in own.key:
            np.testing.assert_array_equal(layer[..., C:], filling)


def test_padding_never_shows(model: Qwen) -> None:
    """Any ids behind the lengths, even ids that do not exist, leave every bit as it was."""
    rows = ragged_rows()
    hidden, gradient = forward(model, rows)
    for rubbish in (60, -5, 2_000_000_000):
        changed = dict(rows)
        for level in ("guide", "question"):
            behind = np.arange(rows[level].shape[-1]) >= rows[f"{level}_length"][..., None]
            assert behind.any()
            changed[level] = np.where(behind, np.int32(rubbish), rows[level])
        again, gradient_again = forward(model, changed)
        np.testing.assert_array_equal(again, hidden)
        for a, b in zip(jax.tree.leaves(gradient_again), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)  # scatter-adds may change their order


def test_wider_padding_changes_nothing_but_rounding(model: Qwen) -> None:
    rows = ragged_rows()
    expected, _ = forward(model, rows)
    wider = {
        **rows,
        "guide": np.pad(rows["guide"], ((0, 0), (0, 3))),
        "question": np.pad(rows["question"], ((0, 0), (0, 0), (0, 2))),
    }
    np.testing.assert_allclose(nnx.jit(completed)(model, wider), expected, atol=1e-5)


def test_positions_matter(model: Qwen) -> None:
    rows = ragged_rows()
    expected, _ = forward(model, rows)
    found, _ = forward(model, {**rows, "completion_start": rows["completion_start"] + 1})
    assert np.abs(np.asarray(found - expected)).max() > 1e-3


def test_remat_changes_no_gradient(model: Qwen) -> None:
    rows = ragged_rows()
    again = drawn_model(small_config(), remat=Remat.LAYER)
    results = zip(*(jax.tree.leaves(forward(m, rows)) for m in (model, again)), strict=True)
    for a, b in results:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_remat_keeps_less() -> None:
    """What the backward pass keeps of the layers shrinks to little more than their inputs."""
    rows = ragged_rows()

    def kept(remat: Remat) -> int:
        graph, params = nnx.split(drawn_model(small_config(layers=7), remat=remat))
        of_params = lambda p: completed(nnx.merge(graph, p), rows)  # noqa: E731
        pull = jax.eval_shape(lambda p: jax.vjp(of_params, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (7,))

    weights = sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(drawn_model(small_config(layers=7)).layers))
    )
    assert kept(Remat.LAYER) - weights < (kept(Remat.NONE) - weights) / 2


def test_bfloat16_computes_in_half_with_float32_parameters(model: Qwen) -> None:
    rows = ragged_rows()
    half = drawn_model(small_config(), dtype="bfloat16")
    hidden, gradient = forward(half, rows)
    assert hidden.dtype == jnp.bfloat16
    assert half.empty_cache((1,), 2).key[0].dtype == jnp.bfloat16
    logits = half.logits(hidden)
    assert logits.dtype == jnp.float32
    expected = model.logits(forward(model, rows)[0])
    np.testing.assert_allclose(logits, expected, atol=0.2)
    assert np.corrcoef(np.ravel(logits), np.ravel(expected))[0, 1] > 0.999
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_a_tied_head_is_the_embedding() -> None:
    model = drawn_model(small_config(tied=True))
    np.testing.assert_array_equal(model.head_weight(), model.embed[...].T)
