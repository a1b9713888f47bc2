"""An exported folder as others open it: transformers' loaders and pipeline, silently, same text."""

import contextlib
import copy
import dataclasses
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.config import Family
from r1re_jax.policy import Policy
from r1re_jax.policy_files import load_policy, save_policy
from r1re_jax.report.card import model_card
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import parse_tagged
from tests.tiny import GUIDE, tiny_guide, tiny_model, tiny_policy, tiny_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Messages of transformers at warning level that no file of ours could avoid, with the reason.
# There are none: "Device set to use cpu" is for debugging, "Loading weights" a progress bar.
UNAVOIDABLE: dict[str, str] = {}
LENGTH = 20
PROMPTS = [
    "<|im_start|>user\nAnn likes tea<|im_end|>\n<|im_start|>assistant\n",
    # Marks, digits, white space: what Qwen's own rules cut otherwise than this tokenizer's.
    f"<|im_start|>user\n{GUIDE}12 times:  <e1>Ann</e1>\n\n saw<|im_end|>\n",
]
KINDS = {
    f"{family}-{'tied' if tied else 'untied'}": (family, tied)
    for family in Family
    for tied in (True, False)
}


@contextlib.contextmanager
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on any log message at warning level or above; Python's warnings are errors anyway."""
    transformers.utils.logging.warning_once.cache_clear()  # what another test heard counts again
    # Handlers of their own, and no way up to pytest's: the state is put back below.
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
    heard = [f"{record.name}: {record.getMessage()}" for record in caplog.records]
    assert not [text for text in heard if not any(known in text for known in UNAVOIDABLE)]


def greedy(policy: Policy) -> list[str]:
    """Our texts."""
    return [texts[0] for texts in policy.generate(PROMPTS, max_tokens=LENGTH, temperature=0.0)]


def stopping(policy: Policy) -> Policy:
    """An untied policy that draws the stop token where it drew the ninth token of its text."""
    row = policy.tokenizer.encode(PROMPTS[0])
    for _ in range(9):
        row.append(int(policy.logits([row])[0][-1].argmax()))
    pair = np.array([row[-1], policy.encoder.stop_ids[0]])
    model = nnx.merge(*nnx.split(policy.model))
    model.head[...] = model.head[...].at[:, pair].set(model.head[...][:, pair[::-1]])
    return dataclasses.replace(policy, model=model)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Policy, Path]:
    """A policy of each family, tied and not, and its folder."""
    family, tied = request.param
    policy = tiny_policy(family=family, tied=tied)
    if not tied:
        policy = stopping(policy)
    folder = tmp_path_factory.mktemp("exported") / "policy"
    save_policy(policy, folder)
    return policy, folder


def test_auto_classes_load_it_silently_and_generate_our_greedy_text(
    exported: tuple[Policy, Path], caplog: pytest.LogCaptureFixture
) -> None:
    policy, folder = exported
    with silence(caplog):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        drawn = []
        for prompt in PROMPTS:
            row = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            assert row["input_ids"][0].tolist() == policy.tokenizer.encode(prompt)
            out = network.generate(**row, max_new_tokens=LENGTH)
            drawn.append(out[0, row["input_ids"].shape[1] :].tolist())
    assert [policy.encoder.decode(tokens) for tokens in drawn] == greedy(policy)
    if not policy.config.tied:
        assert len(drawn[0]) <= 9 and drawn[0][-1] == policy.encoder.stop_ids[0]


def test_the_pipeline_gives_our_greedy_text_silently(
    exported: tuple[Policy, Path], caplog: pytest.LogCaptureFixture
) -> None:
    policy, folder = exported
    given = {"max_new_tokens": LENGTH, "return_full_text": False}
    with silence(caplog):
        generate = transformers.pipeline("text-generation", model=str(folder))
        asked = [generate(prompt, do_sample=False, **given) for prompt in PROMPTS]
        unasked = [generate(prompt, **given) for prompt in PROMPTS]
    assert [out[0]["generated_text"] for out in asked] == greedy(policy)
    assert unasked == asked, "greedy unless told otherwise"


def test_the_tokenizer_is_ours_under_every_class(
    exported: tuple[Policy, Path], caplog: pytest.LogCaptureFixture
) -> None:
    policy, folder = exported
    instruction = policy.encoder.template.instruction
    texts = [*PROMPTS, "Tea's 1234 ﬁne cafe\u0301s…\r\n\t a  b ", instruction]
    assert (folder / "chat_template.jinja").read_text() == policy.tokenizer.chat_template
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        with silence(caplog):
            tokenizer = loader.from_pretrained(folder)
        assert tokenizer.chat_template == policy.tokenizer.chat_template
        assert tokenizer.all_special_ids == policy.tokenizer.all_special_ids
        assert len(tokenizer) == len(policy.tokenizer)
        for text in texts:
            assert tokenizer.encode(text) == policy.tokenizer.encode(text)


def test_a_sharded_bfloat16_export_loads_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_policy(tiny_policy(), tmp_path / "policy", dtype="bfloat16", max_shard_bytes=9000)
    assert len(list((tmp_path / "policy").glob("model-*-of-*.safetensors"))) > 2
    load = transformers.AutoModelForCausalLM.from_pretrained
    with silence(caplog):
        assert load(tmp_path / "policy").dtype == torch.bfloat16
        network = load(tmp_path / "policy", dtype=torch.float32)
        row = torch.tensor([tiny_tokenizer().encode(PROMPTS[0])])
        mask = torch.ones_like(row)
        out = network.generate(row, attention_mask=mask, max_new_tokens=LENGTH)
    rounded = load_policy(tmp_path / "policy")
    assert rounded.encoder.decode(out[0, row.shape[1] :].tolist()) == greedy(rounded)[0]


def with_bos() -> Policy:
    """A policy whose tokenizer and chat template begin with a token of their own, as Llama 3's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    model = tiny_model(vocab=len(tokenizer), family=Family.LLAMA)
    encoder = PromptEncoder(tokenizer)
    return Policy(model=model, tokenizer=tokenizer, encoder=encoder, limits=tiny_policy().limits)


def test_a_token_that_begins_texts_stands_once_before_a_chat(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = with_bos()
    save_policy(policy, tmp_path / "policy")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "policy" / name).read_text())["bos_token_id"] == 300
    messages = [{"role": "user", "content": "Ann likes tea"}]
    with silence(caplog):
        generate = transformers.pipeline("text-generation", model=str(tmp_path / "policy"))
        out = generate(messages, max_new_tokens=LENGTH, return_full_text=False)
    prompt = policy.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|begin|>")
    ours = policy.generate([prompt], max_tokens=LENGTH, temperature=0.0)[0][0]
    assert out[0]["generated_text"] == ours


@pytest.mark.parametrize("source", ["base:miniworld", "tiny"])
def test_the_cards_example_asks_as_we_do(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "tiny":
        save_policy(tiny_policy(), source)
    policy = load_policy(source)
    save_policy(policy, "exported", card=model_card(policy, source, name="exported"))
    Path("guide.md").write_text(GUIDE)
    (example,) = re.findall(r"```python\n(.*?)```", Path("exported/README.md").read_text(), re.S)
    printed = io.StringIO()
    with silence(caplog), contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    sentence = parse_tagged("A full <e1>disk</e1> stopped the <e2>queue</e2>.", id="1")
    tokens = policy.encoder.prompt_tokens(tiny_guide(), sentence)
    prompt = policy.tokenizer.decode(tokens, skip_special_tokens=False)
    assert policy.tokenizer.encode(prompt) == tokens
    ours = policy.generate([prompt], temperature=0.0)[0][0]
    assert printed.getvalue() == ours + "\n"


def test_a_warning_would_be_heard(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AssertionError, match="transformers.generation: a flag is void"):
        with silence(caplog):
            logging.getLogger("transformers.generation").warning_once("a flag is void")
