"""Tokenizers out of GGUF files cut text as those of tokenizer.json do."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1re_jax.policy_source import PolicyError
from r1re_jax.task.readers import read_jsonl
from r1re_jax.task.relations import load_guide
from r1re_jax.tokenizer import PRE_TOKENIZERS, gguf_tokenizer, load_tokenizer
from tests.gguf_files import as_metadata
from tests.tiny import tiny_tokenizer

TEXTS = (
    "The <e1>storm</e1> broke the <e2>mast</e2> in 1987.",
    "it's I'LL we've\t tabs\n\n  and  blanks \r\n …",
    "naïve café Å é 漢字 かな 👩‍🔬 ١٢٣ 12345678",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> <tool_call>{}</tool_call>",
    " ",
    "",
)


@pytest.fixture(scope="module")
def pair(shared: Path) -> tuple[Any, Any]:
    """Return the real Qwen2.5 tokenizer, and the one made of its metadata."""
    folder = shared / "tokenizers" / "qwen2_5"
    theirs = AutoTokenizer.from_pretrained(folder)
    metadata = as_metadata(
        folder,
        "qwen2",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=theirs.chat_template,
    )
    metadata["tokenizer.ggml.tokens"] += ["[PAD]", "[PAD]"]  # up to the rows of the embedding
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    return theirs, gguf_tokenizer(metadata, source="q.gguf")


def assert_same(pair: tuple[Any, Any], text: str) -> None:
    """Compare ids and the text they stand for."""
    theirs, made = pair
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert made(text, add_special_tokens=False)["input_ids"] == ids
    assert made.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_qwens_tokens(pair: tuple[Any, Any], text: str) -> None:
    assert_same(pair, text)


@given(text=st.text(max_size=60))
def test_qwens_tokens_of_any_text(pair: tuple[Any, Any], text: str) -> None:
    assert_same(pair, text)


def test_qwens_tokens_of_real_sentences(pair: tuple[Any, Any], shared: Path) -> None:
    for folder, file in (("semeval2010", "test.jsonl"), ("drugprot", "dev.jsonl.gz")):
        schema = load_guide(shared / "data" / folder / "guideline.md").schema
        for example in read_jsonl(shared / "data" / folder / file, schema=schema)[:300]:
            assert_same(pair, example.tagged)


def test_qwens_named_tokens_and_template(pair: tuple[Any, Any]) -> None:
    theirs, made = pair
    assert len(made) == len(theirs)
    assert (made.eos_token_id, made.pad_token_id) == (151645, 151643)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for last in (False, True):
        assert made.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=last
        ) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=last)


def small_metadata(**changes: Any) -> dict[str, Any]:
    """Return the metadata of the tiny tokenizer; None takes a key away."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": sorted(vocab, key=vocab.get),
        "token_type": [3 if text.startswith("<|") else 1 for text in sorted(vocab, key=vocab.get)],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ12345", "'", "Ll"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "5", "'", "Ll"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "5", "'Ll"]),
        ("llama-bpe", ["ab", "Ġ", "123", "45", "'Ll"]),
    ],
)
def test_numbers_and_contractions_are_cut_as_the_family_does(pre: str, pieces: list[str]) -> None:
    assert pre in PRE_TOKENIZERS
    made = gguf_tokenizer(small_metadata(pre=pre), source="m.gguf")
    cut = made.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 12345'Ll")
    assert [piece for piece, _ in cut] == pieces


def test_a_first_token_is_added_to_whole_texts_where_the_file_says_so() -> None:
    plain = gguf_tokenizer(small_metadata(), source="m.gguf")
    begun = gguf_tokenizer(small_metadata(add_bos_token=True), source="m.gguf")
    ids = plain("tea")["input_ids"]
    assert begun("tea")["input_ids"] == [1, *ids]
    assert begun("tea", add_special_tokens=False)["input_ids"] == ids


def test_types_may_be_left_out() -> None:
    made = gguf_tokenizer(small_metadata(token_type=None), source="m.gguf")
    assert made.decode(made("Ann likes tea")["input_ids"]) == "Ann likes tea"


def test_it_is_saved_and_loaded_as_tokenizer_json(tmp_path: Path) -> None:
    made = gguf_tokenizer(small_metadata(pre="smollm"), source="m.gguf")
    made.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    for text in TEXTS:
        assert again(text)["input_ids"] == made(text)["input_ids"]


@pytest.mark.parametrize(
    "changes",
    [{"model": "llama"}, {"pre": "deepseek"}, {"tokens": None}, {"merges": None}, {"model": None}],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"m\.gguf has a tokenizer of .*expected byte-level BPE"):
        gguf_tokenizer(small_metadata(**changes), source="m.gguf")


def test_folders_without_a_readable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PolicyError, match="tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)
