"""Presets have the published sizes; impossible shapes are refused by name."""

import math

import pytest
from flax import nnx

from r1re_jax.model.config import PRESETS, ModelConfig, preset
from r1re_jax.model.qwen import abstract_qwen


def parameter_count(config: ModelConfig) -> int:
    """Count the parameters without allocating any."""
    state = nnx.state(abstract_qwen(config), nnx.Param)
    return sum(math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(state))


# Billions in total and without embeddings (a tied head counts once), as on the models' cards.
PUBLISHED = {
    "qwen2.5-0.5b": (0.49, 0.36),
    "qwen2.5-1.5b": (1.54, 1.31),
    "qwen2.5-3b": (3.09, 2.77),
    "qwen2.5-7b": (7.62, 6.53),
    "qwen2.5-14b": (14.77, 13.2),
    "qwen2.5-32b": (32.76, 31.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_published_parameter_count(name: str) -> None:
    config = PRESETS[name]
    total = parameter_count(config)
    embeddings = config.vocab * config.width * (1 if config.tied else 2)
    billions, inner = PUBLISHED[name]
    assert total / 1e9 == pytest.approx(billions, abs=0.005)
    assert (total - embeddings) / 1e9 == pytest.approx(inner, abs=0.05)


def test_every_preset_is_tested() -> None:
    assert set(PRESETS) == {"nano", *PUBLISHED}


def test_nano_is_a_few_million() -> None:
    assert 1e6 < parameter_count(PRESETS["nano"]) < 5e6


def test_preset_takes_overrides() -> None:
    config = preset("nano", layers=2, vocab=77)
    assert (config.layers, config.vocab, config.width) == (2, 77, PRESETS["nano"].width)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no model preset 'qwen2.5-7B'.*'qwen2.5-7b'"):
        preset("qwen2.5-7B")


GOOD = dict(vocab=10, layers=1, width=8, query_heads=2, kv_heads=1, head_size=4, mlp_width=8)


@pytest.mark.parametrize("field", GOOD)
def test_zero_sizes_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0"):
        ModelConfig(**{**GOOD, field: 0})


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key-value heads"):
        ModelConfig(**{**GOOD, "query_heads": 3, "kv_heads": 2})


def test_odd_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="head_size is 5"):
        ModelConfig(**{**GOOD, "head_size": 5})
