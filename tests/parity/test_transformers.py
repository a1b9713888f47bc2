"""The network, its weights and its gradients agree with transformers' own on torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.config import Family, ModelConfig, RopeScaling
from r1re_jax.model.hf import load_hf, save_hf
from r1re_jax.model.hf_config import ARCHITECTURES, hf_config
from r1re_jax.model.names import NAMES, Form
from r1re_jax.model.qwen import Cache, Qwen
from tests.drawn import drawn_model, small_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "tied": small_config(tied=True),
    # Nothing at its usual value: head size apart from width, multi-query, odd epsilon and base.
    "untied": small_config(kv_heads=1, head_size=10, norm_eps=3e-3, rope_theta=123.0),
    "qwen3": small_config(family=Family.QWEN3, head_size=10, norm_eps=3e-3),
    "llama": small_config(family=Family.LLAMA, tied=True),
    # The rows are longer than the old context, whose half is one turn of the third frequency.
    "llama3.1": small_config(
        family=Family.LLAMA,
        head_size=8,
        rope_theta=6.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=0.25, high_freq_factor=1.0, original_context=4
        ),
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def rows(config: ModelConfig) -> np.ndarray:
    """Random tokens, always of one shape: each shape is compiled."""
    return np.random.default_rng(5).integers(0, config.vocab, (3, 9)).astype(np.int32)


@nnx.jit
def logits(model: Qwen, tokens: jax.Array) -> jax.Array:
    """Compute [B, T, V] of flat rows."""
    hidden, _ = model.extend(tokens, start=jnp.zeros(tokens.shape[0], jnp.int32))
    return model.logits(hidden)


def torch_logits(network: "torch.nn.Module", tokens: np.ndarray) -> np.ndarray:
    """Compute the same there."""
    with torch.no_grad():
        return network(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def random_network(config: ModelConfig) -> "torch.nn.Module":
    """Make a random torch network; biases and norms too, which start at zero and one."""
    torch.manual_seed(0)
    there = transformers.AutoConfig.for_model(**hf_config(config))
    network = transformers.AutoModelForCausalLM.from_config(there, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    return network.eval()


@each_config
def test_weights_made_there_give_the_same_logits_here(config: ModelConfig, tmp_path: Path) -> None:
    network = random_network(config)
    network.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    assert model.config == config
    tokens = rows(config)
    difference = np.abs(np.asarray(logits(model, tokens)) - torch_logits(network, tokens))
    assert difference.max() < 1e-4


@each_config
def test_exported_weights_give_the_same_logits_there(config: ModelConfig, tmp_path: Path) -> None:
    model = drawn_model(config)
    save_hf(model, tmp_path / "m", stop_ids=(3, 4), pad_id=5)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(network).__name__ == ARCHITECTURES[config.family]
    assert network.dtype == torch.float32
    assert network.generation_config.eos_token_id == [3, 4]
    assert network.generation_config.pad_token_id == 5
    tokens = rows(config)
    difference = np.abs(np.asarray(logits(model, tokens)) - torch_logits(network, tokens))
    assert difference.max() < 1e-4


@each_config
@pytest.mark.parametrize("side", ["left", "right"])
def test_long_rows_equal_those_that_are_padded_there(
    config: ModelConfig, side: str, tmp_path: Path
) -> None:
    network = random_network(config)
    network.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    rng = np.random.default_rng(8)
    lengths = (600, 517)
    tokens = rng.integers(0, config.vocab, (2, 600)).astype(np.int32)
    slots = np.arange(600)
    places = [slots[:n] if side == "right" else slots[600 - n :] for n in lengths]
    mask = np.stack([np.isin(slots, place) for place in places])
    with torch.no_grad():
        padded = network(
            torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask)
        ).logits.numpy()
    for row, place, found in zip(tokens, places, padded, strict=True):
        ours = np.asarray(logits(model, row[None, place]))[0]
        gap = np.abs(ours - found[place]).max() / np.ptp(ours)
        assert gap < 2e-4


def test_sharded_half_precision_export_loads_there(tmp_path: Path) -> None:
    model = drawn_model(CONFIGS["untied"])
    save_hf(model, tmp_path / "m", dtype="bfloat16", max_shard_bytes=2000)
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert load(tmp_path / "m").dtype == torch.bfloat16
    rounded = load_hf(tmp_path / "m")
    tokens = rows(rounded.config)
    expected = torch_logits(load(tmp_path / "m", dtype=torch.float32), tokens)
    np.testing.assert_allclose(logits(rounded, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folders_made_there_load_here(dtype: "torch.dtype", tmp_path: Path) -> None:
    random_network(CONFIGS["untied"]).to(dtype).save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    # Read again in float32: casting a network there and back rounds its rotary frequencies too.
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = rows(CONFIGS["untied"])
    expected = torch_logits(network, tokens)
    np.testing.assert_allclose(logits(load_hf(tmp_path), tokens), expected, atol=1e-4)


def test_config_in_the_form_of_transformers_4_loads(tmp_path: Path) -> None:
    config = CONFIGS["untied"]
    network = random_network(config)
    network.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    content["torch_dtype"] = content.pop("dtype")
    path.write_text(json.dumps(content))
    assert load_hf(tmp_path).config == config


def test_export_generates_there(tmp_path: Path) -> None:
    """Greedy text of the two is the same: positions, caches and stop ids agree."""
    model = drawn_model(CONFIGS["untied"])
    rows_so_far = rows(model.config)
    for end in range(4, 9):
        rows_so_far[0, end] = int(np.argmax(logits(model, rows_so_far)[0, end - 1]))
    prompt, text = rows_so_far[:1, :4], rows_so_far[0, 4:].tolist()
    save_hf(model, tmp_path / "m", stop_ids=(text[-1],), pad_id=0)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    prompt = torch.tensor(prompt, dtype=torch.long)
    found = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
    )
    assert found[0, 4:].tolist() == text[: text.index(text[-1]) + 1]


def named_gradients(network: "torch.nn.Module") -> dict[str, np.ndarray]:
    """Collect gradients by our names, stacked and transposed as ours."""
    theirs = {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}
    result = {}
    for name in NAMES:
        if name.theirs(Form.HF) not in theirs:
            continue  # not of this family
        if name.stacked:
            count = network.config.num_hidden_layers
            result[name.ours] = np.stack([theirs[name.theirs(Form.HF, i)] for i in range(count)])
        else:
            result[name.ours] = theirs[name.theirs(Form.HF)]
        if name.transposed:
            result[name.ours] = np.swapaxes(result[name.ours], -1, -2)
    return result


def assert_gradients_equal(found: nnx.State, network: "torch.nn.Module") -> None:
    """Compare every parameter's gradient to 1e-4 of its largest entry."""
    expected = named_gradients(network)
    flat = {".".join(map(str, p)): leaf.get_value() for p, leaf in nnx.to_flat_state(found)}
    assert flat.keys() == expected.keys()
    for name, gradient in flat.items():
        scale = np.abs(expected[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * scale, err_msg=name)


@each_config
def test_sixty_four_greedy_tokens_are_the_same(config: ModelConfig, tmp_path: Path) -> None:
    network = random_network(config)
    network.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    prompt = np.random.default_rng(9).integers(0, config.vocab, 20).tolist()
    row = np.zeros((1, 84), np.int32)
    row[0, :20] = prompt
    for end in range(20, 84):
        row[0, end] = int(np.argmax(logits(model, row)[0, end - 1]))
    there = torch.tensor([prompt], dtype=torch.long)
    found = network.generate(
        there,
        attention_mask=torch.ones_like(there),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found[0].tolist() == row[0].tolist()


@each_config
def test_flat_gradients(config: ModelConfig, tmp_path: Path) -> None:
    model = drawn_model(config)
    save_hf(model, tmp_path / "m")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokens = rows(config)
    cotangent = np.random.default_rng(6).normal(size=(*tokens.shape, config.vocab)).astype("f4")
    out = network(torch.tensor(tokens, dtype=torch.long)).logits
    (out.log_softmax(-1) * torch.tensor(cotangent)).sum().backward()

    @nnx.jit
    def gradient(model: Qwen) -> nnx.State:
        loss = lambda m: (jax.nn.log_softmax(logits(m, tokens)) * cotangent).sum()  # noqa: E731
        return nnx.grad(loss)(model)

    assert_gradients_equal(gradient(model), network)


def test_tree_gradients_are_those_of_flat_rows_there(tmp_path: Path) -> None:
    """One guide, two questions of different lengths, two completions each, against four rows."""
    config = CONFIGS["tied"]
    model = drawn_model(config)
    save_hf(model, tmp_path / "m")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.integers(0, config.vocab, shape).astype(np.int32)  # noqa: E731
    guide, question, completion = draw(1, 6), draw(1, 2, 4), draw(1, 2, 2, 3)
    guide_length, question_length = np.array([5], np.int32), np.array([[4, 2]], np.int32)
    cotangent = rng.normal(size=(1, 2, 2, 3, config.vocab)).astype("f4")

    total = 0.0
    for p, g in np.ndindex(2, 2):
        row = [*guide[0, :5], *question[0, p, : question_length[0, p]], *completion[0, p, g]]
        out = network(torch.tensor([row], dtype=torch.long)).logits[0, -3:]
        total = total + (out.log_softmax(-1) * torch.tensor(cotangent[0, p, g])).sum()
    total.backward()

    @nnx.jit
    def gradient(model: Qwen) -> tuple[jax.Array, nnx.State]:
        return nnx.value_and_grad(tree_loss)(model)

    def tree_loss(m: Qwen) -> jax.Array:
        _, level = m.extend(guide, start=jnp.zeros(1, jnp.int32))
        top = Cache(level.key, level.value, guide_length)
        start = np.repeat(guide_length[:, None], 2, 1)
        _, level = m.extend(question, start=start, ancestors=(top,))
        middle = Cache(level.key, level.value, question_length)
        start = np.repeat((start + question_length)[..., None], 2, 2)
        hidden, _ = m.extend(completion, start=start, ancestors=(top, middle))
        return (jax.nn.log_softmax(m.logits(hidden)) * cotangent).sum()

    value, found = gradient(model)
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-5)
    assert_gradients_equal(found, network)
