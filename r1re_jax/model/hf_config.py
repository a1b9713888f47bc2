"""Hugging Face's config.json of Qwen2, in and out."""

from collections.abc import Mapping, Sequence

from r1re_jax.model.config import ModelConfig

ARCHITECTURE, MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"
PRODUCER = "r1re_jax"  # marks our exports in config.json, so that only they are overwritten


class HFError(ValueError):
    """A Hugging Face folder that cannot be read or written as asked."""


def config_from_hf(config: Mapping) -> ModelConfig:
    """Read a config.json of Qwen2 in either form.

    Both `rope_theta` (transformers 4) and `rope_parameters` (transformers 5) are understood. What
    the network does not compute (rotary scaling, sliding windows, other activations) is refused.

    Raises:
        HFError: another architecture, missing keys (all named) or unsupported settings (all named).
    """
    kind = config.get("model_type")
    architectures = config.get("architectures") or []
    if kind != MODEL_TYPE or (architectures and ARCHITECTURE not in architectures):
        raise HFError(
            f"model_type {kind!r} with architectures {list(architectures)} is not supported;"
            f" expected {MODEL_TYPE!r} with {ARCHITECTURE} (Qwen2 and Qwen2.5)"
        )
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise HFError(f"config.json lacks whole numbers for: {', '.join(missing)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if problems := _unsupported(config, rope):
        raise HFError(f"config.json asks for what is not implemented: {'; '.join(problems)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return ModelConfig(
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        width=width,
        query_heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or width // heads,
        mlp_width=config["intermediate_size"],
        # 10,000 and 1e-6 are what transformers assumes where the keys are absent.
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position=int(config.get("max_position_embeddings") or 32_768),
    )


def _unsupported(config: Mapping, rope: Mapping) -> list[str]:
    """Name the settings that would make the forward pass another function than ours."""
    problems = []
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        problems.append(f"rotary scaling {rope_type!r} (only 'default')")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or []):
        problems.append("sliding-window attention (only full attention)")
    if (activation := config.get("hidden_act") or "silu") != "silu":
        problems.append(f"hidden_act {activation!r} (only 'silu')")
    return problems


def hf_config(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> dict:
    """Return the config.json that transformers' AutoModelForCausalLM accepts, versions 4 and 5.

    Args:
        config: shapes of the model.
        dtype: in which the weights are written.
        stop_ids: ids that end a completion, the first being the usual one.
        pad_id: id of the padding token, where there is one.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        # Both forms, so that readers of either generation find theirs.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": _one_or_list(stop_ids),
        "pad_token_id": pad_id,
        "producer": PRODUCER,
    }


def _one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    return (list(ids) if len(ids) > 1 else ids[0]) if ids else None
