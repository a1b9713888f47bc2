"""GGUF files give the logits of a torch model that is filled from what they hold."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from r1re_jax.model.config import Family, ModelConfig, RopeScaling
from r1re_jax.model.gguf_file import gguf_config, load_gguf, open_gguf
from r1re_jax.model.hf_config import hf_config
from r1re_jax.model.qwen import Qwen
from r1re_jax.policy_files import load_policy
from r1re_jax.tokenizer import gguf_tokenizer
from tests.gguf_files import gguf_names, parted, write_gguf
from tests.parity.test_transformers import logits, random_network, torch_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Super-blocks have 256 numbers of a row.
SHAPE = dict(vocab=64, layers=2, width=256, query_heads=4, kv_heads=2, head_size=64, mlp_width=256)
LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
CONFIGS = {
    "qwen2": ModelConfig(**SHAPE, family=Family.QWEN2, norm_eps=1e-5, rope_theta=1e4),
    "qwen2 tied": ModelConfig(**SHAPE, family=Family.QWEN2, tied=True),
    "qwen3": ModelConfig(**{**SHAPE, "head_size": 128}, family=Family.QWEN3),
    "llama": ModelConfig(**SHAPE, family=Family.LLAMA, tied=True, rope_theta=1e5),
    "llama3.1": ModelConfig(
        **SHAPE, family=Family.LLAMA, rope_theta=5e5, rope_scaling=LLAMA31, max_position=131072
    ),
}
PROSE = Path(__file__, "../../../docs/architecture.md").resolve().read_text("utf-8")
POSITIONS, PROMPT, TEXT = 520, 20, 64


def factors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the tensor that stands for Llama 3.1's scaling, as llama.cpp's converter computes it.

    A loop over wave lengths, as in convert_hf_to_gguf.py.
    """
    if config.rope_scaling is None:
        return {}
    found = []
    for i in range(0, config.head_size, 2):
        wave = 2 * np.pi * config.rope_theta ** (i / config.head_size)
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        if wave < 8192 / 4.0:
            found.append(1.0)
        elif wave > 8192 / 1.0:
            found.append(8.0)
        else:
            found.append(1 / ((1 - smooth) / 8.0 + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}


def filled_network(config: ModelConfig, tensors: dict[str, np.ndarray]) -> "torch.nn.Module":
    """Make a torch network that has these tensors."""
    there = transformers.AutoConfig.for_model(**hf_config(config))
    network = transformers.AutoModelForCausalLM.from_config(there, dtype=torch.float32)
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    missing = network.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if config.tied else [])
    return network.eval()


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Draw weights, biases and norms, by Hugging Face's names."""
    network = random_network(config)
    return {name: tensor.detach().numpy() for name, tensor in network.named_parameters()}


def assert_same(model: Qwen, network: "torch.nn.Module") -> None:
    """Compare logits of a long row, and a greedy text."""
    row = np.random.default_rng(1).integers(0, model.config.vocab, (1, POSITIONS)).astype(np.int32)
    ours = np.asarray(logits(model, row))
    assert np.abs(ours - torch_logits(network, row)).max() <= 2e-4 * np.ptp(ours)
    text = row[:, : PROMPT + TEXT].copy()
    for end in range(PROMPT, PROMPT + TEXT):
        text[0, end] = int(np.argmax(logits(model, text)[0, end - 1]))
    prompt = torch.tensor(text[:, :PROMPT], dtype=torch.long)
    drawn = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=TEXT,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert drawn[0].tolist() == text[0].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0], ids=lambda kind: kind.name)
def test_every_family(name: str, kind: Kind, tmp_path: Path) -> None:
    config = CONFIGS[name]
    written = write_gguf(
        tmp_path / "m.gguf", config, random_tensors(config), kind=kind, extra=factors(config)
    )
    file = open_gguf(written.path)
    assert gguf_config(file) == config
    assert_same(load_gguf(file), filled_network(config, written.tensors))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "kind",
    [
        *(Kind.F32, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1),
        *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    ],
    ids=lambda kind: kind.name,
)
def test_every_quantisation(name: str, kind: Kind, tmp_path: Path) -> None:
    config = CONFIGS[name]
    written = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), kind=kind)
    model, network = load_gguf(open_gguf(written.path)), filled_network(config, written.tensors)
    row = np.random.default_rng(2).integers(0, config.vocab, (1, POSITIONS)).astype(np.int32)
    ours = np.asarray(logits(model, row))
    assert np.abs(ours - torch_logits(network, row)).max() <= 2e-4 * np.ptp(ours)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [(Kind.Q4_1, Kind.Q8_0), (Kind.Q4_0, Kind.F16), (Kind.Q8_0, Kind.Q4_1), (Kind.F32, Kind.F16)],
)
def test_of_a_tied_matrix_that_is_stored_twice_the_head_is_taken(
    embedding: Kind, head: Kind, tmp_path: Path
) -> None:
    config = CONFIGS["llama"]
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    kinds = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    written = write_gguf(tmp_path / "m.gguf", config, tensors, kind=Kind.Q4_1, kinds=kinds)
    file = open_gguf(written.path)
    assert gguf_config(file).tied
    held = dict(written.tensors)
    held["model.embed_tokens.weight"] = held.pop("lm_head.weight")
    assert_same(load_gguf(file), filled_network(config, held))


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    """A head near the embedding, but another one, where nothing is lost by quantisation."""
    config = CONFIGS["qwen2"]
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1.05)
    written = write_gguf(tmp_path / "m.gguf", config, tensors, kind=Kind.F16)
    file = open_gguf(written.path)
    assert not gguf_config(file).tied
    assert_same(load_gguf(file), filled_network(config, written.tensors))


def test_smollm2(smollm2: Path) -> None:
    """The real policy: 272 tensors by hand, logits of 640 positions, 64 greedy tokens."""
    reader = gguf.GGUFReader(smollm2)
    file = open_gguf(smollm2)
    config = gguf_config(file)
    theirs = {there: here for here, there in gguf_names(config).items()}
    tensors = {}
    for tensor in reader.tensors:
        name = theirs[tensor.name]
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        tensors[name] = parted(rows, heads) if heads else rows
    assert len(tensors) == 272
    network = filled_network(config, tensors)
    model = load_gguf(file)
    words = gguf_tokenizer(file.metadata, source=smollm2.name)
    row = np.array([words(PROSE)["input_ids"][:640]], np.int32)
    assert row.size == 640
    ours = np.asarray(logits(model, row))
    assert np.abs(ours - torch_logits(network, row)).max() <= 2e-4 * np.ptp(ours)
    with torch.no_grad():
        for side in ("left", "right"):
            places = np.arange(640, 768) if side == "right" else np.arange(128)
            padded = np.insert(row[0], 640 if side == "right" else 0, np.zeros(128, np.int32))
            mask = ~np.isin(np.arange(768), places)
            found = network(
                torch.tensor(padded[None], dtype=torch.long),
                attention_mask=torch.tensor(mask[None]),
            ).logits.numpy()[:, mask]
            assert np.abs(ours - found).max() <= 2e-4 * np.ptp(ours)

    policy = load_policy(smollm2)
    story = "Write a long story about a storm at sea."
    asked = f"<|im_start|>user\n{story}<|im_end|>\n<|im_start|>assistant\n"
    ((text,),) = policy.generate([asked], max_tokens=64, temperature=0)
    prompt = torch.tensor([words(asked)["input_ids"]], dtype=torch.long)
    drawn = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=list(policy.encoder.stop_ids),
        pad_token_id=2,
    )
    written = drawn[0, prompt.shape[1] :].tolist()
    assert len(written) == 64 and not set(written) & set(policy.encoder.stop_ids)
    assert words.decode(written) == text
