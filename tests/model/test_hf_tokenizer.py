"""Tokenizer files that transformers 4 and 5 read alike, whatever class they choose."""

import json
import pathlib

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1re_jax.model.config import Family
from r1re_jax.model.hf_config import hf_config
from r1re_jax.model.hf_tokenizer import SETTINGS, save_tokenizer
from tests.tiny import GUIDE, tiny_config, tiny_tokenizer

# What tells Qwen's rules from those of the tiny tokenizer.
TEXT = f"{GUIDE} 12345 <e1>Ann's</e1>  tea\r\n\n cafe\u0301 x"


def written(folder: pathlib.Path, tokenizer: PreTrainedTokenizerFast, family: Family) -> dict:
    """Save a tokenizer beside a model's config.json; return its settings."""
    folder.mkdir(exist_ok=True)
    config = hf_config(tiny_config(family=family))
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(tokenizer, folder, family=family)
    return json.loads((folder / SETTINGS).read_text())


@pytest.mark.parametrize("family", Family)
def test_settings_are_those_that_both_generations_know(
    family: Family, tmp_path: pathlib.Path
) -> None:
    settings = written(tmp_path, tiny_tokenizer(), family)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in settings and "backend" not in settings
    # Again after loading, which adds keys of its own.
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert written(tmp_path / "again", loaded, family) == settings


@pytest.mark.parametrize("family", Family)
def test_the_auto_class_reads_the_same_tokens(family: Family, tmp_path: pathlib.Path) -> None:
    written(tmp_path, tiny_tokenizer(), family)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode(TEXT) == tiny_tokenizer().encode(TEXT)


def test_the_detour_is_needed(tmp_path: pathlib.Path) -> None:
    """Fails once transformers reads a Qwen2 model's tokenizer.json as it stands: then remove it."""
    settings = written(tmp_path, tiny_tokenizer(), Family.QWEN2)
    assert settings.pop("auto_map") == ["", ""]
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode(TEXT) != tiny_tokenizer().encode(TEXT)


def test_qwens_own_tokenizer_needs_none(shared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    qwen = PreTrainedTokenizerFast.from_pretrained(shared / "tokenizers" / "qwen2_5")
    assert "auto_map" not in written(tmp_path, qwen, Family.QWEN2)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(TEXT) == qwen.encode(TEXT)
