"""A policy's tokenizer, from a Hugging Face folder or from a GGUF file's metadata."""

import os
from collections.abc import Mapping
from typing import Any

from r1re_jax.files import fetched, place
from r1re_jax.policy_source import PolicyError

# How text is cut before byte pairs are merged, by GGUF's `tokenizer.ggml.pre`; None: as in GPT-2.
# The patterns are those of the families' tokenizer.json.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
PRE_TOKENIZERS: dict[str, str | None] = {
    "gpt-2": None,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": r"\p{N}",
}
# Types of a token there (llama.cpp's llama_token_type).
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """Load tokenizer.json and its settings as a fast tokenizer, whatever class they name.

    Raises:
        PolicyError: no tokenizer.json, or one that cannot be read.
    """
    path = place(folder) / "tokenizer.json"
    if not path.is_file():
        raise PolicyError(
            f"{folder} has no tokenizer.json; a policy needs a fast tokenizer beside it"
        )
    # Imported late: it takes seconds, and most of a run does without it.
    from transformers import PreTrainedTokenizerFast

    try:
        with fetched(path.parent) as here:
            return PreTrainedTokenizerFast.from_pretrained(here)
    except Exception as error:  # the Rust library raises plain exceptions
        raise PolicyError(f"{path} cannot be read: {error}") from error


def gguf_tokenizer(metadata: Mapping[str, Any], *, source: str) -> Any:
    """Make a fast tokenizer of a GGUF file's tokens, merges and chat template.

    Args:
        metadata: of the file.
        source: its name, for messages.

    Raises:
        PolicyError: no tokenizer there, or one that is not byte-level BPE with a known cut.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    of = lambda key: metadata.get(f"tokenizer.ggml.{key}")  # noqa: E731
    kind, cut, tokens = of("model"), of("pre") or "gpt-2", of("tokens")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS or not tokens or of("merges") is None:
        raise PolicyError(
            f"{source} has a tokenizer of model {kind!r}, cut {cut!r}, {len(tokens or [])} tokens;"
            f" expected byte-level BPE: model 'gpt2' with merges, cut one of"
            f" {', '.join(PRE_TOKENIZERS)}"
        )
    types = of("token_type") or [0] * len(tokens)
    used = [id for id, type in enumerate(types) if type != _UNUSED]
    merges = [tuple(merge.split(" ")) for merge in of("merges")]
    backend = Tokenizer(
        models.BPE(
            {tokens[id]: id for id in used}, merges, ignore_merges=PRE_TOKENIZERS[cut] == _LLAMA3
        )
    )
    if PRE_TOKENIZERS[cut] == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(PRE_TOKENIZERS[cut])
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(backend, tokens, types)
    named = {
        name: tokens[of(f"{key}_token_id")]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
        if isinstance(of(f"{key}_token_id"), int) and of(f"{key}_token_id") < len(tokens)
    }
    if of("add_bos_token") and "bos_token" in named:
        backend.post_processor = _begin(named["bos_token"], of("bos_token_id"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _pre_tokenizer(pattern: str | None) -> Any:
    """Cut by the pattern, then into bytes; patterns of digits alone leave words to GPT-2's rule."""
    from tokenizers import Regex, pre_tokenizers

    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    whole = pattern != PRE_TOKENIZERS["smollm"]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole),
        ]
    )


def _add_whole_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Mark the tokens that are found in a text before it is cut; control tokens are special."""
    from tokenizers import AddedToken

    for type, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        add(
            [
                AddedToken(t, normalized=False)
                for t, of in zip(tokens, types, strict=True)
                if of == type
            ]
        )


def _begin(token: str, id: int) -> Any:
    """Put the token in front of whole texts (prompts of chat templates bring their own)."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, id)]
    )
