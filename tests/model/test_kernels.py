"""The chip's kernels, interpreted on the CPU, equal attention by XLA, which has its own oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from r1re_jax.model import kernels as chip
from r1re_jax.model.attention import attend
from r1re_jax.model.int8 import Int8
from r1re_jax.model.parts import Part
from r1re_jax.model.spread import Attention, Kernels, Spread
from tests.train.world import mesh_of

N, P, G, T, K, HEADS, SIZE = 1, 4, 2, 20, 2, 4, 16


class Case:
    """Queries of completions below a guide of 17 tokens and questions of 3, 9, 0 and 5."""

    def __init__(self, *, tokens: int = T) -> None:
        random = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
        self.query = draw(N, P, G, tokens, HEADS, SIZE)
        self.arrays = [
            (draw(K, N, SIZE, 24), draw(K, N, 24, SIZE)),
            (draw(K, N, P, SIZE, 9), draw(K, N, P, 9, SIZE)),
            (draw(K, N, P, G, SIZE, tokens), draw(K, N, P, G, tokens, SIZE)),
        ]
        self.lengths = [jnp.array([17]), jnp.array([[3, 9, 0, 5]]), None]
        self.cotangent = draw(*self.query.shape)

    def gradients(self, spread: Spread | None) -> tuple:
        """Return the result and its gradients."""

        def attended(query: jax.Array, arrays: list) -> jax.Array:
            parts = [Part(*of, length) for of, length in zip(arrays, self.lengths, strict=True)]
            return attend(query, parts, spread=spread)

        def whole(query: jax.Array, arrays: list, cotangent: jax.Array) -> tuple:
            out, pull = jax.vjp(attended, query, arrays)
            return out, pull(cotangent)

        return jax.jit(whole)(self.query, self.arrays, self.cotangent)


def assert_equal(found: tuple, expected: tuple) -> None:
    """Value and all gradients agree to rounding."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


def interpreted(mesh: Mesh) -> Spread:
    """Spread attention by kernels over a mesh of CPUs."""
    spread = Spread.on(mesh, Attention.KERNELS)
    assert spread is not None and spread.kernels == Kernels(interpret=True)
    return spread


# Blocks that hold everything, that divide neither keys nor queries, and of which some are skipped.
@pytest.mark.parametrize("block", [512, 16, 12])
def test_kernels_equal_xla(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "BLOCK", block)
    case = Case()
    assert_equal(case.gradients(interpreted(mesh_of(1, 1, 1))), case.gradients(None))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("block", [512, 12])
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 1), (1, 1, 2), (1, 2, 1, 4), (1, 1, 2, 2)])
def test_on_a_mesh_every_device_computes_its_own(
    sizes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the guide's keys, which all devices hold, are summed over them."""
    monkeypatch.setattr(chip, "BLOCK", block)
    case = Case()
    assert_equal(case.gradients(interpreted(mesh_of(*sizes))), case.gradients(None))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("sizes", [(1, 2, 1, 4), (2, 1, 1, 2), (1, 1, 2, 4)])
def test_positions_are_shared_by_xla_too(sizes: tuple[int, ...]) -> None:
    case = Case()
    spread = Spread.on(mesh_of(*sizes), Attention.XLA)
    assert spread is not None and spread.kernels is None
    assert_equal(case.gradients(spread), case.gradients(None))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("way", [Attention.XLA, Attention.KERNELS])
def test_the_own_row_alone_shared_by_eight(way: Attention) -> None:
    case = Case(tokens=40)
    case.arrays, case.lengths = case.arrays[2:], case.lengths[2:]
    assert_equal(case.gradients(Spread.on(mesh_of(1, 1, 1, 8), way)), case.gradients(None))


def test_one_token_a_row_as_decoding_has_it() -> None:
    case = Case(tokens=1)
    case.lengths[2] = jnp.ones((N, P, G), jnp.int32)
    assert_equal(case.gradients(interpreted(mesh_of(1, 1, 1))), case.gradients(None))


def test_keys_beyond_the_length_may_be_anything() -> None:
    case, spread = Case(), interpreted(mesh_of(1, 1, 1))
    expected = case.gradients(spread)
    key, value = case.arrays[0]
    case.arrays[0] = key.at[..., 17:].set(1e4), value.at[..., 17:, :].set(-1e4)
    (out, (query, arrays)) = case.gradients(spread)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(query, expected[1][0])
    assert not np.any(arrays[0][0][..., 17:]) and not np.any(arrays[0][1][..., 17:, :])


def test_nothing_that_is_not_seen_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks above the diagonal and beyond the length are skipped: of their queries or keys."""
    monkeypatch.setattr(chip, "BLOCK", 8)
    of = chip.Shape(heads=1, rows=1, queries=32, slots=32, size=8, group=1, interpret=True)
    assert [int(of.seen(jnp.int32(0), jnp.int32(block))) for block in range(4)] == [8, 16, 24, 32]
    grouped = chip.Shape(heads=1, rows=1, queries=64, slots=32, size=8, group=2, interpret=True)
    assert int(grouped.seen(jnp.int32(0), jnp.int32(3))) == 16
    prefix = chip.Shape(heads=1, rows=1, queries=32, slots=32, size=8, group=0, interpret=True)
    assert int(prefix.seen(jnp.int32(11), jnp.int32(0))) == 11


def test_what_a_kernel_does_not_take_is_left_to_xla() -> None:
    cpu, tpu_sized = Kernels(interpret=True), Kernels()
    case = Case()
    shape = (K, N, P, G, T, HEADS // K, SIZE)
    part = Part(*case.arrays[0], case.lengths[0])
    assert cpu.takes(shape, part)
    assert not tpu_sized.takes(shape, part), "16 is no multiple of a chip's 128 lanes"
    key, value = (
        Int8.of(x, axis=a, dtype="float32") for x, a in zip(case.arrays[0], (-2, -1), strict=True)
    )
    assert not cpu.takes(shape, Part(key, value, case.lengths[0]))
    if jax.device_count() >= 8:
        uneven = interpreted(mesh_of(1, 8, 1))
        assert not uneven.suits(shape, [part]), "four questions cannot be shared by eight devices"


def test_kernels_are_chosen_by_platform() -> None:
    mesh = mesh_of(1, 1, 1)
    assert Spread.on(mesh, Attention.AUTO) is None, "a CPU would interpret them"
    assert Spread.on(mesh, Attention.XLA) is None
    assert Spread.on(mesh, Attention.KERNELS) == Spread(mesh, Kernels(interpret=True))
