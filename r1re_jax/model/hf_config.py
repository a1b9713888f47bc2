"""Hugging Face's config.json of the families that the model computes, in and out."""

from collections.abc import Mapping, Sequence

from r1re_jax.model.config import Family, ModelConfig, RopeScaling
from r1re_jax.model.weights import WeightsError

ARCHITECTURES = {
    Family.QWEN2: "Qwen2ForCausalLM",
    Family.QWEN3: "Qwen3ForCausalLM",
    Family.LLAMA: "LlamaForCausalLM",
}
# What transformers assumes where the key is absent.
HEAD_SIZES = {Family.QWEN3: 128}  # in the others, width / heads
MAX_POSITIONS = {Family.QWEN2: 32_768, Family.QWEN3: 32_768, Family.LLAMA: 2048}
PRODUCER = "r1re_jax"  # marks our exports in config.json, so that only they are overwritten


def config_from_hf(config: Mapping) -> ModelConfig:
    """Read a config.json of Qwen2, Qwen3 or Llama in either form.

    Both `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)
    are understood. What the network does not compute (other rotary scaling, sliding windows, other
    activations or biases) is refused.

    Raises:
        WeightsError: another architecture, missing keys or unsupported settings (all named).
    """
    family = _family(config)
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise WeightsError(f"config.json lacks whole numbers for: {', '.join(missing)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if problems := _unsupported(config, rope):
        raise WeightsError(f"config.json asks for what is not implemented: {'; '.join(problems)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return ModelConfig(
        family=family,
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        width=width,
        query_heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or HEAD_SIZES.get(family, width // heads),
        mlp_width=config["intermediate_size"],
        # 10,000 and 1e-6 are what transformers assumes where the keys are absent.
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=_scaling(rope),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_position=int(config.get("max_position_embeddings") or MAX_POSITIONS[family]),
    )


def _family(config: Mapping) -> Family:
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    known = kind in [family.value for family in Family]
    if not known or (architectures and ARCHITECTURES[Family(kind)] not in architectures):
        expected = ", ".join(f"{family.value!r} with {ARCHITECTURES[family]}" for family in Family)
        raise WeightsError(
            f"model_type {kind!r} with architectures {list(architectures)} is not supported;"
            f" expected {expected}"
        )
    return Family(kind)


def _rope_type(rope: Mapping) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _scaling(rope: Mapping) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if not isinstance(rope.get(key), int | float)]:
        raise WeightsError(f"rotary scaling 'llama3' lacks numbers for: {', '.join(missing)}")
    factor, low, high, context = (rope[key] for key in keys)
    return RopeScaling(
        factor=float(factor),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_context=int(context),
    )


def _unsupported(config: Mapping, rope: Mapping) -> list[str]:
    """Name the settings that would make the forward pass another function than ours."""
    problems = []
    if (rope_type := _rope_type(rope)) not in ("default", "llama3"):
        problems.append(f"rotary scaling {rope_type!r} (only 'default' and 'llama3')")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or []):
        problems.append("sliding-window attention (only full attention)")
    if (activation := config.get("hidden_act") or "silu") != "silu":
        problems.append(f"hidden_act {activation!r} (only 'silu')")
    # Qwen2 has its biases without saying so; these keys are of the other families.
    problems += [f"{key} (only none)" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    return problems


def hf_config(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
) -> dict:
    """Return the config.json that transformers' AutoModelForCausalLM accepts, versions 4 and 5.

    Args:
        config: shapes of the model.
        dtype: in which the weights are written.
        stop_ids: ids that end a completion, the first being the usual one.
        pad_id: id of the padding token, where there is one.
        bos_id: id of the token that begins a text, where there is one.
    """
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family.value,
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
        **_hf_rope(config),
        "torch_dtype": dtype,
        "dtype": dtype,
        "tie_word_embeddings": config.tied,
        **_family_keys(config.family),
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": _one_or_list(stop_ids),
        "pad_token_id": pad_id,
        "producer": PRODUCER,
    }


def _hf_rope(config: ModelConfig) -> dict:
    theta = {"rope_theta": config.rope_theta}
    if config.rope_scaling is None:
        return {**theta, "rope_parameters": {"rope_type": "default", **theta}}
    scaling = config.rope_scaling
    parameters = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    return {**theta, "rope_scaling": parameters, "rope_parameters": {**parameters, **theta}}


def _family_keys(family: Family) -> dict:
    """Return the keys that only some families have."""
    if family is Family.QWEN2:
        return {"use_sliding_window": False}
    if family is Family.QWEN3:
        return {"use_sliding_window": False, "attention_bias": False}
    return {"attention_bias": False, "mlp_bias": False}


def _one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    return (list(ids) if len(ids) > 1 else ids[0]) if ids else None


def hf_generation(config: Mapping) -> dict:
    """Return the generation_config.json that goes with a config.json of ours.

    Decoding is greedy unless a caller asks for more: what a base model's own file says of sampling
    was chosen for chats. No temperature stands beside it, since transformers warns of one that
    `do_sample` makes void.
    """
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**ids, "do_sample": False}
