"""A policy small enough for every test: random weights, byte-level tokenizer, a guide, sentences.

model = tiny_model()                     # 2 layers, width 16, 64 tokens, untied head
policy = tiny_policy()                   # the same with the vocabulary of tiny_tokenizer()
"""

import functools

import numpy as np

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Level
from r1re_jax.policy import Limits, Policy
from r1re_jax.task.miniworld.tokenizer import train_tokenizer
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import Example, Guide, Mention, parse_guide
from tests.drawn import drawn_model

GUIDE = """# Tiny

## Relations

- **Likes(X = person, Y = thing)**: X is fond of Y.
- **Near(X = thing, Y = thing)** [no direction]: X and Y are close.
- **Other**: none of these.

## Rules

1. One label for each pair.
"""
WORDS = "Ann likes tea near the old mill, Bob saw a cat"


def tiny_config(**overrides: object) -> ModelConfig:
    """Two layers, four query heads on two key-value heads, 64 tokens."""
    shape = dict(vocab=64, layers=2, width=16, query_heads=4, kv_heads=2, head_size=8, mlp_width=32)
    return ModelConfig(**{**shape, "rope_theta": 1e4, "max_position": 512, **overrides})


def tiny_model(seed: int = 0, *, dtype: str = "float32", **overrides: object) -> Qwen:
    """Random weights, biases and norms too."""
    return drawn_model(tiny_config(**overrides), seed=seed, dtype=dtype)


@functools.cache
def tiny_tokenizer():
    """Byte-level BPE of 300 tokens, a ChatML template, eos `<|im_end|>`, pad `<|endoftext|>`."""
    return train_tokenizer([GUIDE, WORDS], vocab=300)


def tiny_guide() -> Guide:
    """Likes, Near without direction, Other."""
    return parse_guide(GUIDE, source="tiny.md")


def tiny_examples(count: int = 4) -> list[Example]:
    """Sentences `e0` … that differ in length; gold labels in turn."""
    labels = ("Likes(e1,e2)", "Likes(e2,e1)", "Near", "Other")
    examples = []
    for i in range(count):
        tail = "tea " * (i + 1)
        text = f"Ann likes {tail.strip()}."
        head = Mention("Ann", 0, 3)
        thing = Mention(tail.strip(), 10, 9 + len(tail))
        examples.append(Example(f"e{i}", text, head, thing, labels[i % 4]))
    return examples


def tiny_policy(seed: int = 0, **overrides: object) -> Policy:
    """A policy of random weights over `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    return Policy(
        model=tiny_model(seed, vocab=len(tokenizer), **overrides),
        tokenizer=tokenizer,
        encoder=PromptEncoder(tokenizer),
        limits=Limits(guide=320, question=96, completion=24),
    )


def random_level(random: np.random.Generator, shape: tuple[int, ...], *, least: int = 0) -> Level:
    """Ragged rows of random tokens [*shape] of the tiny vocabulary, rubbish in the padding."""
    tokens = random.integers(0, 64, shape).astype(np.int32)
    length = random.integers(least, shape[-1] + 1, shape[:-1]).astype(np.int32)
    return Level(np.where(np.arange(shape[-1]) < length[..., None], tokens, 10_000), length)
