"""Policy: logits and texts of verbatim prompts, and every kind of place it is loaded from."""

import dataclasses

import jax
import numpy as np
import pytest

from r1re_jax.model.config import ModelConfig
from r1re_jax.policy import Limits, Policy
from r1re_jax.policy_source import PolicyError
from r1re_jax.rollout.rollout import Rollout
from tests.oracles import flat_qwen
from tests.saved import worded_policy
from tests.tiny import tiny_model

PROMPTS = [
    "<|im_start|>user\nAnn likes tea<|im_end|>\n<|im_start|>assistant\n",
    "Bob saw",
    "Bob saw a cat near the old mill, " * 3,
    "Bob saw",
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Random weights, with a template and stop tokens that are not the default ones."""
    return worded_policy()


def test_logits_are_those_of_a_plain_forward(policy: Policy) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(0, 300, length).tolist() for length in (5, 40, 1, 33, 7)]
    found = policy.logits([*rows, []])
    params = flat_qwen.parameters(policy.model)
    assert [logits.shape for logits in found] == [(len(row), 300) for row in [*rows, []]]
    assert all(logits.dtype == np.float32 for logits in found)
    with jax.enable_x64(True):
        oracle = jax.jit(
            lambda tokens_T: flat_qwen.logits(params, policy.config, tokens_T[None])[0]
        )
        for row, logits in zip(rows, found, strict=False):
            padded = np.array(row + [0] * (40 - len(row)))
            np.testing.assert_allclose(logits, oracle(padded)[: len(row)], atol=2e-4)


def test_logits_refuse_what_the_model_cannot_read(policy: Policy) -> None:
    with pytest.raises(
        PolicyError, match="row 1 holds ids from 2 to 300; the model knows 0 to 299"
    ):
        policy.logits([[1], [2, 300]])
    with pytest.raises(PolicyError, match="row 0 holds ids from -1"):
        policy.logits([[-1]])
    with pytest.raises(PolicyError, match="row 0 are 513 tokens; the model was made for 512"):
        policy.logits([[1] * 513])


def test_generate_is_a_function_of_its_arguments(policy: Policy) -> None:
    given = dict(samples=2, max_tokens=8, temperature=1.0, seed=4)
    first = policy.generate(PROMPTS, **given)
    assert [len(texts) for texts in first] == [2] * 4
    assert policy.generate(PROMPTS, **given) == first
    assert policy.generate(PROMPTS, **given | {"seed": 5}) != first


def test_generate_does_not_depend_on_the_other_prompts(policy: Policy) -> None:
    given = dict(samples=2, max_tokens=8, temperature=1.0, seed=0)
    together = policy.generate(PROMPTS, **given)
    turned = policy.generate(PROMPTS[::-1], **given)
    assert turned == [together[i] for i in (1, 2, 3, 0)]
    assert policy.generate(PROMPTS[2:3], **given) == together[2:3]
    # The same prompt a second time is another draw.
    assert together[1] != together[3]


def test_generate_batches_many_samples(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(samples=2, max_tokens=8, temperature=1.0, seed=0)
    together = policy.generate(PROMPTS, **given)
    monkeypatch.setattr("r1re_jax.policy.ROWS", 2)
    assert policy.generate(PROMPTS, **given) == together


def test_texts_end_before_the_stop_token(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, likes = policy.tokenizer("Ann likes", add_special_tokens=False)["input_ids"][:2]
    stop, pad = policy.encoder.stop_ids[0], policy.encoder.pad_id
    tokens = np.array([[[ann, likes, stop, pad], [likes, ann, likes, ann]]])
    drawn = Rollout(
        tokens=tokens,
        length=np.array([[3, 4]]),
        logp=np.zeros(tokens.shape),
        truncated=np.array([[False, True]]),
    )
    monkeypatch.setattr("r1re_jax.policy.generate", lambda *_, **__: drawn)
    decode = policy.tokenizer.decode
    expected = [decode([ann, likes]), decode([likes, ann, likes, ann])]
    assert policy.generate(["x"], samples=2, max_tokens=4) == [expected]


def test_greedy_text_follows_the_logits(policy: Policy) -> None:
    prompt = PROMPTS[0]
    row = policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row[0] == policy.tokenizer.convert_tokens_to_ids("<|im_start|>"), "parsed as special"
    drawn: list[int] = []
    while len(drawn) < 5:
        drawn.append(int(policy.logits([row + drawn])[0][-1].argmax()))
        if drawn[-1] in policy.encoder.stop_ids:
            break
    expected = policy.encoder.decode(drawn)
    assert policy.generate([prompt], max_tokens=5, temperature=0.0) == [[expected]]


def test_generate_refuses_what_has_no_answer(policy: Policy) -> None:
    assert policy.generate([]) == []
    with pytest.raises(PolicyError, match="prompt 1 is empty"):
        policy.generate(["a", ""], max_tokens=2)
    with pytest.raises(PolicyError, match="samples is 0"):
        policy.generate(["a"], samples=0)
    with pytest.raises(PolicyError, match="prompt 0 and 512 further tokens are 5.. tokens"):
        policy.generate(["a b"], max_tokens=512)


def test_a_tokenizer_of_another_model_is_refused(policy: Policy) -> None:
    with pytest.raises(PolicyError, match="the tokenizer has 300 tokens and the model 64"):
        dataclasses.replace(policy, model=tiny_model())


@pytest.mark.parametrize("value", [0, 1.5, "7"])
def test_limits_are_numbers_of_tokens(value: object) -> None:
    with pytest.raises(PolicyError, match="limits.question is"):
        Limits(question=value)


def test_the_config_is_the_models(policy: Policy) -> None:
    assert isinstance(policy.config, ModelConfig) and policy.config is policy.model.config
