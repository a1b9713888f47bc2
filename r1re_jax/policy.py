"""The policy as people use it: model, tokenizer, prompts and limits, loaded from a folder."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import pad_level
from r1re_jax.policy_source import PolicyError
from r1re_jax.rollout.keys import Purpose, example_id, row_keys
from r1re_jax.rollout.rollout import generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.tasks import Task, TaskKind, make_task

# Completions that are drawn at a time, and fp32 logits that exist at a time (256 MB).
ROWS, LOGITS = 512, 2**26
SHORTEST = 32  # narrowest bucket of rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Most tokens of each level; longer prompts are refused, longer completions are truncated.

    Attributes:
        guide: S.
        question: Q.
        completion: C, the stop token included.
    """

    guide: int = 2048
    question: int = 512
    completion: int = 1024

    def __post_init__(self) -> None:
        """Refuse limits below one token."""
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise PolicyError(
                    f"limits.{name} is {value!r}; it must be a number of tokens from 1 on"
                )


class Wordless:
    """Stands for the encoder of a model that came without a usable tokenizer.

    Logits of token ids need none; whatever asks for words gets a PolicyError that says why not.
    """

    def __init__(self, why: str):
        """Keep the reason."""
        self._why = why

    def __getattr__(self, name: str) -> Any:
        """Refuse."""
        raise PolicyError(f"this policy has no words: {self._why}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A model and everything that decides which tokens it sees.

    Attributes:
        model: the network.
        tokenizer: Hugging Face fast tokenizer; None where there is no usable one.
        encoder: guides and examples to tokens and back; knows template and stop tokens.
        limits: widths of the levels.
        guide_sha256: title -> SHA-256 of the guides that the policy was trained on, where known.
        provenance: where the weights came from, for people.
    """

    model: Qwen
    tokenizer: Any
    encoder: PromptEncoder | Wordless
    limits: Limits = Limits()
    guide_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    provenance: str = ""

    def __post_init__(self) -> None:
        """Refuse a tokenizer whose tokens the model has no rows for."""
        if self.tokenizer is not None:
            check_vocabulary(self.tokenizer, self.config)

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(self.model)

    def for_task(self, task: Task) -> "Policy":
        """Return the policy with a task's prompts; its own words stay where it was made for it."""
        return dataclasses.replace(self, encoder=self.encoder.for_task(task))

    def for_kind(self, kind: TaskKind) -> "Policy":
        """Return the policy asked for another task; of its own it keeps what completions earn."""
        return self if self.encoder.task.kind is kind else self.for_task(make_task(kind))

    def logits(self, token_rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the fp32 logits [T, V] of every row of token ids, positions from 0.

        Raises:
            PolicyError: a row longer than the model's positions, or an id outside its vocabulary.
        """
        rows = [np.asarray(row, np.int64).reshape(-1) for row in token_rows]
        for number, row in enumerate(rows):
            self._check_positions(len(row), f"row {number}")
            if row.size and not (0 <= row.min() and row.max() < self.config.vocab):
                raise PolicyError(
                    f"row {number} holds ids from {row.min()} to {row.max()}; the model knows 0 to"
                    f" {self.config.vocab - 1}"
                )
        found = [np.empty((0, self.config.vocab), np.float32)] * len(rows)
        for width, members in _buckets([len(row) for row in rows]).items():
            at_once = _power_below(max(1, LOGITS // (width * self.config.vocab)))
            for batch in _batches(members, at_once):
                filled = [rows[i] for i in batch] + [[]] * (_power_above(len(batch)) - len(batch))
                level = pad_level(filled, limit=width, pad_id=0)
                logits_PTV = np.asarray(_row_logits(*self._split, level.tokens))
                for i, logits_TV in zip(batch, logits_PTV, strict=False):
                    found[i] = logits_TV[: len(rows[i])].copy()  # not the whole batch kept alive
        return found

    def generate(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[str]]:
        """Draw completions of prompts as they stand: no template added, special tokens parsed.

        Equal arguments give equal texts. A text's randomness depends on (seed, its prompt, how
        often that prompt stood before, its number among the samples) alone, not on other prompts.

        Args:
            prompts: P texts.
            samples: G texts for each.
            max_tokens: most tokens of a completion; None takes the policy's limit.
            temperature: 0 is greedy.
            seed: 0 … 2³²−1.

        Returns:
            [P][G] texts, without stop token.

        Raises:
            PolicyError: a prompt without tokens, or one that leaves no positions for max_tokens.
        """
        limit = self.limits.completion if max_tokens is None else max_tokens
        if samples < 1 or limit < 1:
            raise PolicyError(
                f"samples is {samples} and max_tokens {limit}; both must be at least 1"
            )
        stops, pad = self.encoder.stop_ids, self.encoder.pad_id
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        for number, row in enumerate(rows):
            if not row:
                raise PolicyError(f"prompt {number} is empty; there is nothing to continue")
            self._check_positions(len(row) + limit, f"prompt {number} and {limit} further tokens")
        ids = _prompt_ids(prompts)
        settings = SamplingSettings(temperature=temperature)
        texts: list[list[str]] = [[] for _ in rows]
        for width, members in _buckets([len(row) for row in rows]).items():
            for batch in _batches(members, _power_below(max(1, ROWS // samples))):
                blank = _power_above(len(batch)) - len(batch)
                question = pad_level([rows[i] for i in batch] + [[]] * blank, limit=width, pad_id=0)
                batch_ids = ids[[*batch, *[0] * blank]]
                drawn = generate(
                    *self._split,
                    (question,),
                    keys=row_keys(seed, Purpose.GENERATE, 0, batch_ids, range(samples)),
                    settings=settings,
                    limit=limit,
                    stop_ids=stops,
                    pad_id=pad,
                )
                tokens_PGC, length_PG = np.asarray(drawn.tokens), np.asarray(drawn.length)
                for i, *of_prompt in zip(batch, tokens_PGC, length_PG, strict=False):
                    pairs = zip(*of_prompt, strict=True)
                    texts[i] = [self.encoder.decode(row[:length]) for row, length in pairs]
        return texts

    def _check_positions(self, tokens: int, what: str) -> None:
        if tokens > self.config.max_position:
            raise PolicyError(
                f"{what} are {tokens} tokens; the model was made for {self.config.max_position}"
            )


def check_vocabulary(tokenizer: Any, config: ModelConfig) -> None:
    """Raise PolicyError where a tokenizer has tokens that the model has no rows for."""
    if len(tokenizer) > config.vocab:
        raise PolicyError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab}; they do not"
            " belong together"
        )


@functools.partial(jax.jit, static_argnames="graph")
def _row_logits(graph: nnx.GraphDef, params: nnx.State, tokens_PT: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    hidden_PTD, _ = model.extend(tokens_PT, start=jnp.zeros(tokens_PT.shape[:1], jnp.int32))
    return model.logits(hidden_PTD)


def _prompt_ids(prompts: Sequence[str]) -> np.ndarray:
    """Return [P, 2] uint32: what keys are made of, by text and how often it stood before."""
    seen: Counter[str] = Counter()
    ids = np.empty((len(prompts), 2), np.uint32)
    for place, text in enumerate(prompts):
        ids[place] = example_id(str(seen[text]), text)
        seen[text] += 1
    return ids


def _buckets(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Return width -> places of the rows that are padded to it; few widths: powers of two."""
    found: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        if length:
            found.setdefault(max(SHORTEST, _power_above(length)), []).append(place)
    return found


def _batches(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
