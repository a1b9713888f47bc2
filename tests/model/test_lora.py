"""Low-rank adapters against plain NumPy: the merge, the forward, and the gradients of A and B."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.config import Family
from r1re_jax.model.lora import Lora, adapt, is_adapter, merge
from r1re_jax.model.qwen import Cache, Qwen, abstract_qwen
from tests.oracles.lora import Arrays, arrays, merged_by_hand
from tests.tiny import tiny_config, tiny_model

LORA = Lora(rank=3, alpha=2.0)
ALL = ("query", "key", "value", "output", "gate", "up", "down")


def with_arrays(model: Qwen, params: Arrays) -> Qwen:
    """A model of these arrays."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    placed = [(p, v.replace(jnp.asarray(params[".".join(map(str, p))]))) for p, v in flat]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def shapes(lora: Lora = LORA, **config: object) -> Qwen:
    """The tiny model's shapes with adapters."""
    return adapt(abstract_qwen(tiny_config(**config)), lora)


def drawn_adapter(model: Qwen, *, seed: int = 1) -> Arrays:
    """Numbers for A and B, none of them zero."""
    random = np.random.default_rng(seed)
    flat = nnx.to_flat_state(nnx.state(model))
    named = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
    return {
        name: random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in named.items()
        if is_adapter(name)
    }


def forward(model: Qwen) -> tuple[jax.Array, jax.Array]:
    """Logits of a guide and of two rows below it, and of one token decoded below both."""
    start = jnp.zeros(1, jnp.int32)
    hidden, own = model.extend(jnp.array([[1, 2, 3, 4]]), start=start)
    guide = Cache(own.key, own.value, jnp.array([3]))
    rows = jnp.array([[[5, 6], [7, 8]]])
    below, own = model.extend(rows, start=jnp.full((1, 2), 3), ancestors=(guide,))
    caches = (guide, Cache(own.key, own.value, jnp.array([[2, 1]])))
    token, _ = model.decode(
        jnp.array([[9, 10]]),
        step=jnp.int32(0),
        start=jnp.array([[5, 4]]),
        ancestors=caches,
        own=model.empty_cache((1, 2), 1),
    )
    return model.logits(below), model.logits(token)


@pytest.mark.parametrize("family", Family)
def test_the_forward_is_that_of_merged_weights(family: Family) -> None:
    plain = tiny_model(family=family)
    model = shapes(family=family)
    adapter = drawn_adapter(model)
    adapted = with_arrays(model, arrays(plain) | adapter)
    merged = with_arrays(plain, merged_by_hand(arrays(plain), adapter, LORA))
    for ours, expected, before in zip(
        forward(adapted), forward(merged), forward(plain), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(expected - before).max() > 0.05, "the adapter does something"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_zeros_changes_no_bit(dtype: str) -> None:
    plain = tiny_model(dtype=dtype)
    model = adapt(abstract_qwen(tiny_config(), dtype=dtype), LORA)
    adapter = drawn_adapter(model)
    adapter = {n: x * np.float32(not n.endswith(".b")) for n, x in adapter.items()}
    graph, state = nnx.split(with_arrays(model, arrays(plain) | adapter))
    ours = jax.jit(lambda s: forward(nnx.merge(graph, s)))(state)
    graph, state = nnx.split(plain)
    expected = jax.jit(lambda s: forward(nnx.merge(graph, s)))(state)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_merging_is_the_sum_in_numpy() -> None:
    base = arrays(tiny_model())
    adapter = drawn_adapter(shapes(Lora(rank=3, targets=r"layers\.(key|down)\.weight")))
    assert adapter.keys() == {f"layers.{x}.adapter.{y}" for x in ("key", "down") for y in "ab"}
    on_device = {name: jnp.asarray(value) for name, value in base.items()}
    found = merge(on_device, jax.tree.map(jnp.asarray, adapter), scale=LORA.scale)
    expected = merged_by_hand(base, adapter, LORA)
    assert found.keys() == base.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
        assert name.split(".")[1:2] in (["key"], ["down"]) or value is on_device[name]


def test_a_base_of_another_type_is_merged_before_it_is_rounded() -> None:
    base = arrays(tiny_model())
    adapter = drawn_adapter(shapes())
    held = {name: jnp.asarray(value, jnp.bfloat16) for name, value in base.items()}
    rounded = {name: np.asarray(value, np.float32) for name, value in held.items()}
    found = merge(held, jax.tree.map(jnp.asarray, adapter), scale=LORA.scale)
    expected = merged_by_hand(rounded, adapter, LORA)["layers.up.weight"]
    assert found["layers.up.weight"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found["layers.up.weight"], np.float32), expected, rtol=2**-8
    )


def test_gradients_are_the_chain_rule_of_the_merged_weights_gradient() -> None:
    plain, model = tiny_model(), shapes()
    adapter = drawn_adapter(model)
    direction = np.random.default_rng(2).normal(size=(1, 2, 2, 64)).astype(np.float32)
    loss = lambda m: jnp.vdot(jax.nn.log_softmax(forward(m)[0]), direction)  # noqa: E731
    gradient = nnx.jit(lambda m: jax.grad(loss)(m))
    full = arrays(gradient(with_arrays(plain, merged_by_hand(arrays(plain), adapter, LORA))))
    ours = arrays(gradient(with_arrays(model, arrays(plain) | adapter)))
    for part in ALL:
        a, b = (adapter[f"layers.{part}.adapter.{side}"].astype(np.float64) for side in "ab")
        weight = full[f"layers.{part}.weight"].astype(np.float64)
        for layer in range(2):
            expected = {
                "a": LORA.alpha / LORA.rank * weight[layer] @ b[layer].T,
                "b": LORA.alpha / LORA.rank * a[layer].T @ weight[layer],
            }
            for side, value in expected.items():
                found = ours[f"layers.{part}.adapter.{side}"][layer]
                scale = np.abs(value).max()
                assert scale > 1e-4
                np.testing.assert_allclose(found, value, atol=1e-4 * scale, err_msg=part + side)


def test_targets_are_whole_names() -> None:
    model = abstract_qwen(tiny_config())
    assert Lora(rank=1).choose(model) == [f"layers.{name}.weight" for name in sorted(ALL)]
    assert Lora(rank=1, targets=r".*\.up\.weight").choose(model) == ["layers.up.weight"]
    before = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    adapt(model, LORA)
    after = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert after == before, "the argument stays as it is"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (r"layers\.wq\.weight", r"matches no matrix; there are layers\.down\.weight, .*query"),
        (r"layers\.query", "matches no matrix"),
        (
            r"layers\..*norm\.weight",
            r"layers\.attention_norm\.weight, layers\.mlp_norm\.weight, wh",
        ),
        (r"layers\.query\..*", r"matches layers\.query\.bias, which LoRA does not adapt: only"),
        ("embed|head", r"matches embed, head, which LoRA does not adapt"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(Lora(rank=1, targets=targets))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": -1}, "rank is -1; it must be at least 0"),
        ({"rank": 1, "alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"rank": 1, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 1, "targets": "(up"}, "no regular expression"),
    ],
)
def test_settings_without_meaning_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**given)
