"""config.json in both forms, and what is refused."""

import dataclasses

import numpy as np
import pytest

from r1re_jax.model.config import PRESETS, Family, ModelConfig, RopeScaling
from r1re_jax.model.hf_config import config_from_hf, hf_config, hf_generation
from r1re_jax.model.weights import WeightsError

SMALL = ModelConfig(
    vocab=50,
    layers=2,
    width=16,
    query_heads=4,
    kv_heads=2,
    head_size=4,
    mlp_width=24,
    rope_theta=5e5,
    norm_eps=1e-5,
    tied=True,
    max_position=128,
)

# Qwen2.5-0.5B-Instruct's config.json as published: the form of transformers 4.
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# The same in the form of transformers 5.
NEW_FORM = {
    **{k: v for k, v in PUBLISHED.items() if k not in ("rope_theta", "torch_dtype")},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 24,
    "sliding_window": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}


@pytest.mark.parametrize("published", [PUBLISHED, NEW_FORM], ids=["v4", "v5"])
def test_published_config_is_the_preset(published: dict) -> None:
    assert config_from_hf(published) == PRESETS["qwen2.5-0.5b"]


def test_ours_comes_back() -> None:
    assert config_from_hf(hf_config(SMALL)) == SMALL


@pytest.mark.parametrize(
    ("ids", "written"), [((), None), ((7,), 7), ((7, 8), [7, 8])], ids=["none", "one", "two"]
)
def test_stop_ids(ids: tuple[int, ...], written: int | list[int] | None) -> None:
    assert hf_config(SMALL, stop_ids=ids, pad_id=0)["eos_token_id"] == written


def test_generation_is_greedy_and_knows_the_special_tokens() -> None:
    config = hf_config(SMALL, stop_ids=(7, 8), pad_id=0, bos_id=9)
    assert config["bos_token_id"] == 9
    ids = {"bos_token_id": 9, "eos_token_id": [7, 8], "pad_token_id": 0}
    assert hf_generation(config) == {**ids, "do_sample": False}


def test_missing_kv_heads_mean_multi_head_attention() -> None:
    config = config_from_hf({**PUBLISHED, "num_key_value_heads": None})
    assert config.kv_heads == config.query_heads == 14


def test_defaults_are_those_of_transformers() -> None:
    bare = {k: v for k, v in PUBLISHED.items() if k not in ("rope_theta", "rms_norm_eps")}
    config = config_from_hf({**bare, "rope_scaling": None, "tie_word_embeddings": False})
    assert (config.rope_theta, config.norm_eps, config.tied) == (10_000.0, 1e-6, False)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(WeightsError, match="model_type 'gemma'.*GemmaForCausalLM.*expected"):
        config_from_hf({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]})


# Llama-3.1-8B-Instruct's config.json as published, where it differs from Qwen's.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_NEW_FORM = {
    **{k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")},
    "rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": 500000.0},
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("published", [LLAMA, LLAMA_NEW_FORM], ids=["v4", "v5"])
def test_llama_with_its_rotary_scaling(published: dict) -> None:
    config = config_from_hf(published)
    assert (config.family, config.head_size, config.rope_theta) == (Family.LLAMA, 128, 5e5)
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    assert not config.qkv_bias and not config.qk_norm
    assert config_from_hf(hf_config(config)) == config


def test_rotary_scaling_stretches_slow_frequencies_alone() -> None:
    scaled = config_from_hf(LLAMA)
    plain = dataclasses.replace(scaled, rope_scaling=None).rope_frequencies
    ratio = plain / scaled.rope_frequencies
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(ratio[turns >= 4], 1.0)
    np.testing.assert_allclose(ratio[turns <= 1], 8.0)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) and (np.diff(between) > 0).all() and (1 < between.min() < 8)


def test_qwen3_has_heads_of_their_own_size() -> None:
    published = {**PUBLISHED, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    config = config_from_hf(published)
    assert (config.family, config.head_size) == (Family.QWEN3, 128)
    assert config.qk_norm and not config.qkv_bias
    assert config_from_hf(hf_config(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks numbers for: low_freq"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "'dynamic'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "model_type 'llama'.*Qwen2ForCausalLM"),
    ],
)
def test_what_llama_may_not_ask_for(change: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        config_from_hf({**LLAMA, **change})


def test_rotary_scaling_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="0 < low_freq_factor < high_freq_factor"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0, original_context=8192)


def test_qwen2_with_another_head_is_refused() -> None:
    with pytest.raises(WeightsError, match="Qwen2ForSequenceClassification"):
        config_from_hf({**PUBLISHED, "architectures": ["Qwen2ForSequenceClassification"]})


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(WeightsError, match="vocab_size, intermediate_size"):
        config_from_hf({**PUBLISHED, "vocab_size": None, "intermediate_size": "big"})


def test_unsupported_settings_are_all_named() -> None:
    settings = {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "use_sliding_window": True,
        "hidden_act": "gelu",
    }
    with pytest.raises(WeightsError, match="'yarn'.*sliding-window.*'gelu'"):
        config_from_hf({**PUBLISHED, **settings})


@pytest.mark.parametrize(
    "setting",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
    ],
)
def test_unsupported_settings_of_the_new_form(setting: dict) -> None:
    with pytest.raises(WeightsError, match="not implemented"):
        config_from_hf({**NEW_FORM, **setting})
