"""The untrained policy: a folder that transformers loads, and a tokenizer for any text."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.launch.fresh import LIMITS, TEMPLATE, corpus, fresh_policy
from r1re_jax.model.config import preset
from r1re_jax.model.hf_config import WeightsError
from r1re_jax.policy import Policy
from r1re_jax.policy_files import load_policy
from r1re_jax.task import miniworld
from r1re_jax.task.miniworld.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.medical import medical_cues, medical_names, medical_words_in

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "r1re_jax" / "base" / "miniworld"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `fresh_policy` writes, with a small corpus."""
    out = tmp_path_factory.mktemp("fresh") / "policy"
    fresh_policy(out, steps=2)
    return out


@pytest.fixture(scope="module")
def policy(folder: pathlib.Path) -> Policy:
    """The folder, loaded."""
    return load_policy(folder)


def test_transformers_loads_it_to_the_same_logits(folder: pathlib.Path, policy: Policy) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = tokenizer("The engine leads to the river.")["input_ids"]
    assert row == policy.tokenizer("The engine leads to the river.")["input_ids"]
    with torch.no_grad():
        expected = network.eval()(torch.tensor([row])).logits[0].numpy()
    np.testing.assert_allclose(policy.logits([row])[0], expected, atol=1e-3, rtol=1e-3)


def test_a_loaded_policy_has_its_template_and_limits(policy: Policy) -> None:
    assert policy.config == preset("nano")
    assert policy.encoder.template == TEMPLATE
    assert policy.limits == LIMITS
    stops = {policy.tokenizer.decode([token]) for token in policy.encoder.stop_ids}
    assert "<|im_end|>" in stops <= set(SPECIAL_TOKENS)


def test_prompts_are_the_same_in_levels_and_whole(policy: Policy) -> None:
    for lesson in miniworld.source(trees=3, questions=4).lessons(0):
        policy.encoder.check(lesson.guide, lesson.examples)


def test_nothing_foreign_is_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match="nothing is overwritten"):
        fresh_policy(tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@given(text=st.text())
def test_any_text_goes_through_the_tokenizer(policy: Policy, text: str) -> None:
    tokens = policy.tokenizer.encode(text, add_special_tokens=False)
    assert policy.tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    "text", ["é ß 漢字 🙂", " two  blanks\n\n", "</think> (e1,e2) - **", "\x00"]
)
def test_strange_texts_go_through_the_tokenizer(policy: Policy, text: str) -> None:
    tokens = policy.tokenizer.encode(text, add_special_tokens=False)
    assert policy.tokenizer.decode(tokens) == text
    specials = set(policy.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    assert not specials & set(tokens)


def test_tags_and_directions_are_single_tokens(policy: Policy) -> None:
    for unit in ("<think>", "</think>", "<answer>", "</answer>", "(e1,e2)", "(e2,e1)"):
        assert len(policy.tokenizer.encode(unit, add_special_tokens=False)) == 1


def test_the_tokenizer_is_a_function_of_its_corpus() -> None:
    one, same = (train_tokenizer(corpus(seed=1, steps=1), vocab=400) for _ in range(2))
    other = train_tokenizer(corpus(seed=2, steps=1), vocab=400)
    assert one.get_vocab() == same.get_vocab() != other.get_vocab()


def test_the_corpus_holds_nothing_medical() -> None:
    assert not medical_words_in(corpus(seed=0))


def test_the_shipped_tokenizer_knows_no_medical_word() -> None:
    if not (SHIPPED / "tokenizer.json").is_file():
        pytest.skip("the base policy has not been built: r1re_jax/base/miniworld")
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(SHIPPED)
    known = {tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
    assert "triggers" in known, "the general domain's words are tokens, so this test can tell"
    assert not known & (medical_names() | medical_cues())
