"""On eight simulated devices: the layout is the one written below, and no result depends on it."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r1re_jax import sharding
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.hf import load_hf, save_hf
from r1re_jax.model.qwen import Cache, Qwen, Remat, abstract_qwen
from tests.drawn import drawn_model

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8",
)

CONFIG = ModelConfig(
    vocab=64, layers=2, width=16, query_heads=4, kv_heads=2, head_size=8, mlp_width=24
)
MESHES = [
    pytest.param(dict(data=2, fsdp=2, tensor=2), id="all"),
    pytest.param(dict(fsdp=8), id="fsdp"),
    pytest.param(dict(fsdp=1, tensor=8), id="tensor", marks=pytest.mark.slow),
    pytest.param(dict(data=8, fsdp=1), id="data", marks=pytest.mark.slow),
]

# The layout, by eye: stacked layers are never split; matrices over fsdp and sequence along the
# width and over tensor along heads, MLP or vocabulary.
LAYOUT = {
    "embed": P("tensor", ("fsdp", "sequence")),
    "head": P(("fsdp", "sequence"), "tensor"),
    "norm.weight": P(None),
    "layers.attention_norm.weight": P(None, None),
    "layers.mlp_norm.weight": P(None, None),
    "layers.query.weight": P(None, ("fsdp", "sequence"), "tensor"),
    "layers.query.bias": P(None, "tensor"),
    "layers.key.weight": P(None, ("fsdp", "sequence"), "tensor"),
    "layers.key.bias": P(None, "tensor"),
    "layers.value.weight": P(None, ("fsdp", "sequence"), "tensor"),
    "layers.value.bias": P(None, "tensor"),
    "layers.output.weight": P(None, "tensor", ("fsdp", "sequence")),
    "layers.gate.weight": P(None, ("fsdp", "sequence"), "tensor"),
    "layers.up.weight": P(None, ("fsdp", "sequence"), "tensor"),
    "layers.down.weight": P(None, "tensor", ("fsdp", "sequence")),
}


# The copy that completions are drawn with: nothing is gathered for a token but rows. Matrices lie
# along heads, or along MLP and vocabulary over all devices of a slice.
DRAWING = {
    "embed": P(("tensor", "fsdp", "sequence"), None),
    "head": P(None, ("tensor", "fsdp", "sequence")),
    "norm.weight": P(None),
    "layers.attention_norm.weight": P(None, None),
    "layers.mlp_norm.weight": P(None, None),
    "layers.query.weight": P(None, None, "tensor"),
    "layers.query.bias": P(None, "tensor"),
    "layers.key.weight": P(None, None, "tensor"),
    "layers.key.bias": P(None, "tensor"),
    "layers.value.weight": P(None, None, "tensor"),
    "layers.value.bias": P(None, "tensor"),
    "layers.output.weight": P(None, "tensor", None),
    "layers.gate.weight": P(None, None, ("tensor", "fsdp")),
    "layers.up.weight": P(None, None, ("tensor", "fsdp")),
    "layers.down.weight": P(None, ("tensor", "fsdp"), None),
}


def by_name(state: nnx.State) -> dict:
    """Return the leaves of a state by dotted name."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def test_mesh_takes_the_devices_that_are_left() -> None:
    shape = lambda **sizes: dict(sharding.make_mesh(**sizes).shape)  # noqa: E731
    assert shape() == dict(data=1, fsdp=8, sequence=1, tensor=1)
    assert shape(data=2, tensor=2) == dict(data=2, fsdp=2, sequence=1, tensor=2)
    assert shape(fsdp=2, sequence=-1) == dict(data=1, fsdp=2, sequence=4, tensor=1)
    assert sharding.make_mesh().axis_types == (jax.sharding.AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=3), "needs 6 .* are 8, for which the nearest mesh is mesh.data=4, mesh.fsdp=2"),
        (
            dict(fsdp=3, tensor=2),
            "nearest mesh is mesh.data=1, mesh.fsdp=4, mesh.sequence=1, mesh.tensor=2",
        ),
        (dict(fsdp=1), "nearest mesh is mesh.data=1, mesh.fsdp=8, mesh.sequence=1, mesh.tensor=1"),
        (dict(data=16), "needs 16 devices; there are 8"),
        (dict(data=2, fsdp=2), "needs 4 devices; there are 8"),
        (dict(data=-1), "one may be -1"),
        (dict(tensor=0), "one may be -1"),
        (dict(tensor=-2), "one may be -1"),
    ],
)
def test_impossible_meshes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("-1", "[-−]1")):
        sharding.make_mesh(**sizes)


def test_specs_by_name() -> None:
    assert sharding.spec(("guide", "question", None)) == P(None, ("data", "fsdp"), None)
    with pytest.raises(KeyError):
        sharding.spec(("width",))


def test_layout_of_every_parameter() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    layout = by_name(sharding.parameter_shardings(nnx.state(abstract_qwen(CONFIG)), mesh))
    assert layout.keys() == LAYOUT.keys()
    for name, found in layout.items():
        assert found == NamedSharding(mesh, LAYOUT[name]), name


def test_layout_of_the_copy_that_draws() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    layout = by_name(sharding.drawing_shardings(nnx.state(abstract_qwen(CONFIG)), mesh))
    assert layout.keys() == DRAWING.keys()
    for name, found in layout.items():
        assert found.is_equivalent_to(NamedSharding(mesh, DRAWING[name]), len(found.spec)), name


def test_what_cannot_be_shared_by_all_is_shared_by_some() -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    spec = sharding.drawing_spec(("embed", "mlp"), (16, 12), mesh)
    assert spec == P(None, "tensor"), "12 columns, 8 devices"
    assert sharding.drawing_spec(("embed", "mlp"), (16, 9), mesh) == P(None, None)


def test_a_mesh_for_drawing_shares_the_same_devices_out_anew() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=4)
    assert sharding.drawing_mesh(mesh) is mesh
    drawing = sharding.drawing_mesh(mesh, tensor=2)
    assert dict(drawing.shape) == dict(data=2, fsdp=2, sequence=1, tensor=2)
    assert drawing.devices.flatten().tolist() == mesh.devices.flatten().tolist()
    with pytest.raises(
        ValueError, match=r"drawing_tensor is 3; it must divide the 4 devices .* as 2 does"
    ):
        sharding.drawing_mesh(mesh, tensor=3)


def test_devices_that_share_positions_share_rows_in_drawing() -> None:
    mesh = sharding.make_mesh(fsdp=2, sequence=2, tensor=2)
    drawing = sharding.drawing_mesh(mesh)
    assert dict(drawing.shape) == dict(data=1, fsdp=4, sequence=1, tensor=2)
    assert drawing.devices.flatten().tolist() == mesh.devices.flatten().tolist()
    assert sharding.question_ways(mesh) == 2
    assert sharding.question_ways(drawing) == 4


def test_positions_are_shared_evenly_or_not_at_all() -> None:
    mesh = sharding.make_mesh(fsdp=2, sequence=4)
    shared = [n for n in range(1, 13) if sharding.shares_positions(mesh, n)]
    assert shared == [4, 8, 12]
    assert not sharding.shares_positions(sharding.make_mesh(), 8)
    assert not sharding.shares_positions(None, 8)
    assert sharding.spec(("question", "position")) == P(("data", "fsdp"), "sequence")


def test_uneven_splits_are_all_named() -> None:
    config = ModelConfig(**{**vars(CONFIG), "vocab": 61, "mlp_width": 25})
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with pytest.raises(
        ValueError, match=r"does not divide 5 .*embed.*\[61, 16\].*gate.*25"
    ) as error:
        sharding.parameter_shardings(nnx.state(abstract_qwen(config)), mesh)
    assert "query" not in str(error.value)
    near = "The nearest that does is mesh.data=1, mesh.fsdp=8, mesh.sequence=1, mesh.tensor=1"
    assert str(error.value).endswith(near), "61 and 25 have no divisors among those of 8"
    sizes = dict(re.findall(r"mesh\.(\w+)=(\d+)", near))
    works = sharding.make_mesh(**{axis: int(size) for axis, size in sizes.items()})
    sharding.parameter_shardings(nnx.state(abstract_qwen(config)), works)
    odd = ModelConfig(**{**vars(config), "width": 15})
    with pytest.raises(ValueError, match="The nearest that does is mesh.data=8, mesh.fsdp=1"):
        sharding.parameter_shardings(nnx.state(abstract_qwen(odd)), mesh)


def batch() -> dict[str, np.ndarray]:
    """Make one tree of eight questions with two completions each."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, CONFIG.vocab, shape).astype(np.int32)  # noqa: E731
    length = rng.integers(1, 5, (1, 8)).astype(np.int32)
    return dict(
        guide=draw(1, 6), question=draw(1, 8, 4), length=length, completion=draw(1, 8, 2, 3)
    )


def loss(model: Qwen, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Compute mean and array of the completion tokens' log-probs, given the tokens before."""
    trees, questions, group = rows["completion"].shape[:3]
    guide_length = jnp.full(trees, 5, jnp.int32)
    _, level = model.extend(rows["guide"], start=jnp.zeros(trees, jnp.int32))
    guide = Cache(level.key, level.value, guide_length)
    start = jnp.repeat(guide_length[:, None], questions, 1)
    _, level = model.extend(rows["question"], start=start, ancestors=(guide,))
    question = Cache(level.key, level.value, rows["length"])
    start = jnp.repeat((start + rows["length"])[..., None], group, 2)
    hidden, _ = model.extend(rows["completion"], start=start, ancestors=(guide, question))
    logp = jax.nn.log_softmax(model.logits(hidden[..., :-1, :]))
    logp = jnp.take_along_axis(logp, rows["completion"][..., 1:, None], -1)
    return logp.mean(), logp


def step(remat: Remat = Remat.NONE) -> tuple[nnx.State, Callable]:
    """Return parameters and a jitted function of (parameters, rows) to log-probs and gradients."""
    graph, params = nnx.split(drawn_model(CONFIG, remat=remat))

    @jax.jit
    def compute(params: nnx.State, rows: dict) -> tuple[jax.Array, nnx.State]:
        on_params = lambda p: loss(nnx.merge(graph, p), rows)  # noqa: E731
        gradient, logp = jax.grad(on_params, has_aux=True)(params)
        return logp, gradient

    return params, compute


@pytest.fixture(scope="module")
def expected() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return log-probs and gradients computed on one device."""
    params, compute = step()
    logp, gradient = compute(params, batch())
    assert len(logp.sharding.device_set) == 1
    return np.asarray(logp), jax.tree.map(np.asarray, by_name(gradient))


def placed(mesh: Mesh) -> dict[str, jax.Array]:
    """Spread the rows: guides everywhere, questions over the data-parallel devices."""
    axes = dict(
        guide=("guide", None),
        question=("guide", "question", None),
        length=("guide", "question"),
        completion=("guide", "question", None, None),
    )
    return {
        name: jax.device_put(array, NamedSharding(mesh, sharding.spec(axes[name])))
        for name, array in batch().items()
    }


@pytest.mark.parametrize("sizes", MESHES)
def test_forward_and_gradient_equal_one_device(sizes: dict[str, int], expected: tuple) -> None:
    mesh = sharding.make_mesh(**sizes)
    params, compute = step(Remat.LAYER if sizes.get("data") == 2 else Remat.NONE)
    layout = sharding.parameter_shardings(params, mesh)
    params = jax.device_put(params, layout)
    rows = placed(mesh)
    assert len(rows["completion"].sharding.device_set) == 8
    logp, gradient = compute(params, rows)
    np.testing.assert_allclose(logp, expected[0], atol=1e-5, rtol=1e-5)
    for name, found in by_name(gradient).items():
        scale = np.abs(expected[1][name]).max()
        np.testing.assert_allclose(found, expected[1][name], atol=1e-5 * scale, err_msg=name)


def test_parameters_are_really_split() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = nnx.state(drawn_model(CONFIG))
    split = by_name(jax.device_put(params, sharding.parameter_shardings(params, mesh)))
    shapes = {name: array.addressable_shards[0].data.shape for name, array in split.items()}
    assert shapes["embed"] == (32, 8)
    assert shapes["layers.down.weight"] == (2, 12, 8)
    assert shapes["layers.key.bias"] == (2, 8)
    assert shapes["norm.weight"] == (16,)


def test_folders_load_onto_a_mesh_and_save_from_it(tmp_path: Path) -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    model = drawn_model(CONFIG)
    save_hf(model, tmp_path / "one")
    spread = load_hf(tmp_path / "one", mesh=mesh)
    for name, array in by_name(nnx.state(spread)).items():
        assert array.sharding == NamedSharding(mesh, LAYOUT[name]), name
    save_hf(spread, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
