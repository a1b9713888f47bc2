"""A tokenizer's files, written so that transformers 4 and 5 read the same tokens from them."""

import copy
import json
from pathlib import Path
from typing import Any

from r1re_jax.model.config import Family

SETTINGS = "tokenizer_config.json"
# How the tokenizer was loaded here, which is nothing of its own.
_OF_LOADING = ("backend", "is_local", "local_files_only")


def save_tokenizer(
    tokenizer: Any, folder: Path, *, family: Family, chat_template: str = ""
) -> None:
    """Write tokenizer.json, its settings and the chat template.

    Args:
        tokenizer: Hugging Face fast tokenizer.
        folder: where the model's config.json is.
        family: of the model: AutoTokenizer chooses its class by it.
        chat_template: that prompts are made by; "" for the tokenizer's own.
    """
    if chat_template and tokenizer.chat_template != chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    path = folder / SETTINGS
    settings = json.loads(path.read_text("utf-8"))
    settings = {key: value for key, value in settings.items() if key not in _OF_LOADING}
    # transformers 5 writes names that 4 does not know, and reads those of 4.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if special := settings.pop("extra_special_tokens", None):
        settings["additional_special_tokens"] = special
    if family is Family.QWEN2 and not _is_qwens(tokenizer):
        # transformers 5 makes a Qwen2 model's tokenizer anew, from vocabulary, merges and Qwen's
        # own rules, whatever class and rules the files name; other rules are other tokens. Where
        # the settings speak of classes in other files, its loader heeds them; this names none.
        settings["auto_map"] = ["", ""]
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _is_qwens(tokenizer: Any) -> bool:
    """Whether a tokenizer cuts text as Qwen's does."""
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    return _rules(tokenizer) == _rules(Qwen2Tokenizer())


def _rules(tokenizer: Any) -> list[Any]:
    """Return how a text becomes tokens, but for vocabulary and merges."""
    backend = tokenizer.backend_tokenizer
    steps = (backend.normalizer, backend.pre_tokenizer)
    # Where offsets begin decides no token.
    cuts = [
        None if step is None else json.loads(step.__getstate__(), object_hook=_without_offsets)
        for step in steps
    ]
    merging = ("byte_fallback", "ignore_merges")  # of BPE; others have neither
    return [*cuts, *(getattr(backend.model, name, None) for name in merging)]


def _without_offsets(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "trim_offsets"}
