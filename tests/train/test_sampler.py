"""The copy of the policy that completions are drawn with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax import sharding
from r1re_jax.rl.kinds import CorrectionKind
from r1re_jax.train.grpo_settings import QuantiseSettings
from r1re_jax.train.sampler import make_sampler
from r1re_jax.train.state import place_params
from tests.train.world import layout_on, mesh_of

PLAIN = QuantiseSettings()


def test_on_one_device_nothing_is_copied() -> None:
    layout, params = layout_on(mesh_of(1, 1, 1))
    placed = place_params(params, layout)
    sampler = make_sampler(layout, PLAIN)
    assert sampler.copied == () and sampler.params(placed) is placed


def test_what_computes_in_bfloat16_draws_with_bfloat16() -> None:
    layout, params = layout_on(mesh_of(1, 1, 1), dtype="bfloat16")
    placed = place_params(params, layout)
    sampler = make_sampler(layout, PLAIN)
    found = sampler.params(placed)
    assert set(sampler.copied) == set(placed)
    for name, copy in found.items():
        np.testing.assert_array_equal(copy, placed[name].astype(jnp.bfloat16))
        assert placed[name].dtype == jnp.float32, "the policy stays as it is"
    assert sampler.correction(CorrectionKind.AUTO, trained=layout) is CorrectionKind.NONE


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("weights", ["none", "int8"])
def test_the_copy_lies_where_drawing_wants_it(weights: str) -> None:
    """It goes from one mesh to another of the same devices, and its numbers stay the same."""
    mesh = mesh_of(2, 4, 1)
    layout, params = layout_on(mesh)
    placed = place_params(params, layout)
    settings = QuantiseSettings(weights=weights)
    drawing = sharding.drawing_mesh(mesh, tensor=2)
    sampler = make_sampler(layout, settings, mesh=drawing)
    assert dict(sampler.layout.mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    found = sampler.params(placed)
    alone = make_sampler(layout_on(mesh_of(1, 1, 1))[0], settings)
    expected = alone.params(place_params(params, layout_on(mesh_of(1, 1, 1))[0]))
    assert found.keys() == expected.keys() == sampler.layout.shapes.keys()
    for name, shape in sampler.layout.shapes.items():
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].sharding.is_equivalent_to(shape.sharding, len(shape.shape)), name
    differs = sampler.correction(CorrectionKind.AUTO, trained=layout)
    assert (differs is CorrectionKind.NONE) == (weights == "none"), "another mesh is no other model"
