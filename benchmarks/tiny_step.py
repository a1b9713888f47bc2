"""The project's own GRPO step at the peers' shapes: the very step that `run.train` does.

Words stand for tokens, no completion ends early, and the reward is a function of the text, so that
all sides do the same work. `update` and `flat_update` do the last part of a step alone, over the
tree and over flat rows.

    python -m benchmarks.tiny_step 704,64,96    # a worker, see `benchmarks.sides`
"""

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
import transformers

from benchmarks import sides
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.hf_config import hf_config
from r1re_jax.model.qwen import abstract_qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy import Limits
from r1re_jax.sharding import make_mesh
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.rewards import Verdict
from r1re_jax.train.grpo import GRPO, GRPOBlock, make_grpo
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.state import TrainState, create_state, model_layout, random_params
from r1re_jax.train.update import compute_gradient

CONFIG = ModelConfig(
    vocab=2048,
    width=256,
    layers=4,
    query_heads=4,
    kv_heads=2,
    head_size=64,
    mlp_width=1024,
    tied=True,
    max_position=4096,
)
QUESTIONS, GROUP = 4, 8
STOP = CONFIG.vocab  # no token of the vocabulary, so that nothing ends early
WORDS = CONFIG.vocab - 2  # the last two ids are padding and end


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens of the levels; `shared` may be 0."""

    shared: int
    question: int
    completion: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read "704,64,96".

        Raises:
            ValueError: not three numbers of tokens.
        """
        numbers = text.split(",")
        if len(numbers) != 3 or not all(number.strip().isdigit() for number in numbers):
            raise ValueError(f"shape is {text!r}; expected SHARED,QUESTION,COMPLETION tokens")
        return cls(*map(int, numbers))

    @property
    def prompt(self) -> int:
        """Tokens of a whole prompt."""
        return self.shared + self.question


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word: w0, w1, …, then padding and end."""
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<pad>": WORDS, "<eos>": WORDS + 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )


def write_model(folder: Path) -> None:
    """Write config and tokenizer for the peers, which draw weights of their own."""
    word_tokenizer().save_pretrained(folder)
    transformers.AutoConfig.for_model(
        **hf_config(CONFIG, stop_ids=[WORDS + 1], pad_id=WORDS)
    ).save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class _Question:
    id: str
    tokens: list[int]
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class _Guide:
    title: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class _Task:
    """Judges a completion as the peers' reward does."""

    def schema(self, guide: _Guide) -> None:
        """Nothing to read answers by."""

    def judge(self, text: str, example: _Question, schema: None) -> Verdict:
        """The reward is a number from 0 to 6."""
        return Verdict(
            reward=float(len(text) % 7), format_ok=True, correct=False, predicted=None, problem=None
        )


class _Encoder:
    """What a step asks of a `PromptEncoder`."""

    def __init__(self):
        self.task, self.stop_ids, self.pad_id = _Task(), (STOP,), WORDS
        self._tokenizer = word_tokenizer()

    def guide_tokens(self, guide: _Guide) -> list[int]:
        return guide.tokens

    def question_tokens(self, example: _Question) -> list[int]:
        return example.tokens

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens)


@dataclasses.dataclass(frozen=True)
class _Source:
    shape: Shape

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        guide = _Guide("guide", [j % 1000 for j in range(self.shape.shared)])
        questions = [QUESTIONS * step + p for p in range(QUESTIONS)]
        of = lambda i: [(7 * i + j) % 1000 for j in range(self.shape.question)]  # noqa: E731
        return (Lesson(guide, tuple(_Question(f"q{i}", of(i)) for i in questions)),)


class Step:
    """A run's steps, one after the other."""

    def __init__(self, shape: Shape, *, group: int = GROUP, **settings: Any):
        self.shape = shape
        layout = model_layout(abstract_qwen(CONFIG), make_mesh(devices=jax.devices()[:1]))
        params = random_params(CONFIG, layout, seed=0)
        self.settings = GRPOSettings(
            steps=10_000, questions=QUESTIONS, group=group, kl_coefficient=0.001, **settings
        )
        self.phase: GRPO = make_grpo(
            self.settings,
            limits=Limits(
                guide=max(shape.shared, 1), question=shape.question, completion=shape.completion
            ),
            encoder=_Encoder(),
            source=_Source(shape),
            seed=0,
            first=0,
            layout=layout,
            reference=random_params(CONFIG, layout, seed=0),
        )
        self.state: TrainState = create_state(params, self.phase.optimizer, layout)
        self.number = 0

    def step(self) -> None:
        """Completions, rewards, reference, update."""
        self.number += 1
        result = self.phase.step(self.state, self.number, tick=lambda note: None)
        self.state = jax.block_until_ready(result.state)
        self.metrics = result.metrics

    def timed(self) -> float:
        """Do a step; return its seconds."""
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin

    @functools.cached_property
    def block(self) -> GRPOBlock:
        """Random tokens in place of a rollout, with what an update needs."""
        rng, shape, rows = np.random.default_rng(0), self.shape, QUESTIONS * self.settings.group
        batch = 1, QUESTIONS, self.settings.group
        draw = lambda *of: rng.integers(0, WORDS, of, np.int32)  # noqa: E731
        full = lambda *of: np.full(of[:-1], of[-1], np.int32)  # noqa: E731
        guide = Level(draw(1, max(shape.shared, 1)), full(1, shape.shared))
        question = Level(draw(1, QUESTIONS, shape.question), full(1, QUESTIONS, shape.question))
        completion = Level(draw(*batch, shape.completion), full(*batch, shape.completion))
        logp = np.full((*batch, shape.completion), -np.log(CONFIG.vocab), np.float32)
        return GRPOBlock(
            tree=Tree(guide, question, completion),
            advantage_NPG=rng.normal(size=batch).astype(np.float32),
            weight_NPGC=np.full_like(logp, 1 / (rows * shape.completion)),
            sampler_logp_NPGC=logp,
            ref_logp_NPGC=logp,
        )

    @functools.cached_property
    def flat_block(self) -> GRPOBlock:
        """The same rows, every prompt written out whole in front of every completion."""
        block, shape = self.block, self.shape
        batch, rows = block.advantage_NPG.shape, block.advantage_NPG.size
        guide = np.broadcast_to(block.tree.guide.tokens, (*batch, max(shape.shared, 1)))
        question = np.broadcast_to(block.tree.question.tokens[:, :, None], (*batch, shape.question))
        prompt = np.concatenate([guide[..., : shape.shared], question], -1)
        flat = lambda x: x.reshape(1, rows, *([1] if x.ndim > 2 else []), *x.shape[3:])  # noqa: E731
        return GRPOBlock(
            tree=Tree(
                Level(np.zeros((1, 1), np.int32), np.zeros(1, np.int32)),
                Level(prompt.reshape(1, rows, -1), np.full((1, rows), shape.prompt, np.int32)),
                Level(flat(block.tree.completion.tokens), flat(block.tree.completion.length)),
            ),
            advantage_NPG=flat(block.advantage_NPG),
            weight_NPGC=flat(block.weight_NPGC),
            sampler_logp_NPGC=flat(block.sampler_logp_NPGC),
            ref_logp_NPGC=flat(block.ref_logp_NPGC),
        )

    def update(self, block: GRPOBlock) -> None:
        """Gradient and optimizer."""
        gradient = compute_gradient(
            self.phase.programs, self.state.params, [block], tick=lambda: None
        )
        self.state = jax.block_until_ready(self.phase.programs.apply(self.state, gradient.params))


def main() -> None:
    """Be a worker: step, update (over the tree) or flat_update."""
    step = Step(Shape.parse(sys.argv[1]))
    work = {
        "step": step.step,
        "update": lambda: step.update(step.block),
        "flat_update": lambda: step.update(step.flat_block),
    }
    for _ in range(2):
        work["step"]()
    for name in sys.argv[2:]:
        work[name]()
    sides.serve({"threads": os.cpu_count()}, work)


if __name__ == "__main__":
    main()
