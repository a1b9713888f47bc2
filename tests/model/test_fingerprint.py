"""Fingerprints: of every bit and its place, on any mesh, in any wider type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax import sharding
from r1re_jax.model.fingerprint import fingerprint
from tests.tiny import tiny_model

SHAPE = (2, 5, 7)


def drawn() -> dict[str, np.ndarray]:
    """Two parameters."""
    random = np.random.default_rng(0)
    return {name: random.normal(size=SHAPE).astype(np.float32) for name in ("one", "other")}


def of(params: dict[str, np.ndarray], dtype: str = "float32") -> str:
    """The fingerprint."""
    return fingerprint({name: jnp.asarray(value) for name, value in params.items()}, dtype=dtype)


@given(place=st.tuples(*(st.integers(0, size - 1) for size in SHAPE)), bit=st.integers(0, 31))
def test_every_bit_counts(place: tuple[int, int, int], bit: int) -> None:
    before = drawn()
    after = drawn()
    after["one"].view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert of(after) != of(before)


def test_places_and_names_count() -> None:
    one, other = drawn().values()
    known = of({"one": one, "other": other})
    assert of({"other": other, "one": one}) == known, "the order of the names does not"
    assert of({"one": other, "other": one}) != known
    assert of({"one": one[:, ::-1], "other": other}) != known
    assert of({"one": one.reshape(2, 7, 5), "other": other}) != known
    assert of({"one": one}) != known


def test_a_wider_type_is_rounded_first() -> None:
    narrow = {name: value.astype(jnp.bfloat16) for name, value in drawn().items()}
    assert of(narrow, "bfloat16") == of(drawn(), "bfloat16") == of(narrow) != of(drawn())


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_nothing(sizes: dict[str, int]) -> None:
    state = nnx.state(tiny_model())
    spread = jax.device_put(state, sharding.parameter_shardings(state, sharding.make_mesh(**sizes)))
    flat = lambda s: {str(path): x.get_value() for path, x in nnx.to_flat_state(s)}  # noqa: E731
    assert fingerprint(flat(spread), dtype="float32") == fingerprint(flat(state), dtype="float32")
