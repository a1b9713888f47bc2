"""The policy as people use it: model, tokenizer, prompts and limits, loaded from a folder."""

import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.hf import load_hf, save_hf
from r1re_jax.model.hf_config import config_from_hf, hf_config
from r1re_jax.model.hf_tokenizer import save_tokenizer
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen
from r1re_jax.model.tree import pad_level
from r1re_jax.policy_source import (
    CHECKPOINTS,
    WORDS,
    PolicyError,
    choose_step,
    find,
    read_json,
    restore,
)
from r1re_jax.rollout.keys import Purpose, example_id, row_keys
from r1re_jax.rollout.rollout import generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.prompts import PromptEncoder, PromptTemplate

RECIPE, CARD = "r1re.json", "README.md"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A model and everything that decides which tokens it sees.

    Attributes:
        model: the network.
        tokenizer: Hugging Face fast tokenizer.
        encoder: guides and examples to tokens and back; knows template and stop tokens.
        limits: widths of the levels.
        guide_sha256: title -> SHA-256 of the guides that the policy was trained on, where known.
        provenance: where the weights came from, for people.
    """

    model: Qwen
    tokenizer: Any
    encoder: PromptEncoder
    limits: Limits = Limits()
    guide_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    provenance: str = ""

    def __post_init__(self) -> None:
        """Refuse a tokenizer whose tokens the model has no rows for."""
        if len(self.tokenizer) > self.config.vocab:
            raise PolicyError(
                f"the tokenizer has {len(self.tokenizer)} tokens and the model {self.config.vocab};"
                " they do not belong together"
            )

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(self.model)

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
                    stop_ids=self.encoder.stop_ids,
                    pad_id=self.encoder.pad_id,
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


def load_policy(
    source: str | os.PathLike,
    *,
    dtype: str = "float32",
    remat: Remat = Remat.NONE,
    mesh: Mesh | None = None,
    step: int | None = None,
) -> Policy:
    """Load a policy.

    Args:
        source: a Hugging Face folder (its r1re.json, where there is one, says template, limits and
            stop tokens), a work directory of run.train, "base:NAME" for a policy that comes with
            the package, or a name on the Hugging Face hub.
        dtype: what the forward computes in; parameters are fp32.
        remat: what the backward pass computes again.
        mesh: where the parameters go, by the sharding table; None: the first device.
        step: of a work directory's checkpoints; None takes the best, where the run scored them,
            else the newest.

    Raises:
        PolicyError: nothing of that kind there; the message says what was looked for.
        HFError: a Hugging Face folder that cannot be read.
    """
    folder = find(source)
    if (folder / CHECKPOINTS).is_dir() or (folder / WORDS).is_dir():
        step = choose_step(folder, step)
        words = folder / WORDS
        config = config_from_hf(read_json(words / "config.json"))
        model = abstract_qwen(config, dtype=dtype, remat=remat)
        model = restore(model, folder / CHECKPOINTS / str(step) / "params", mesh=mesh)
        return _policy(model, words, provenance=f"{source}, step {step}")
    if step is not None:
        raise PolicyError(f"{folder} is no work directory, so it has no step {step}")
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"{folder} holds no policy: expected config.json and safetensors (a Hugging Face"
            f" folder), or {WORDS}/ and {CHECKPOINTS}/ (a work directory)"
        )
    return _policy(
        load_hf(folder, dtype=dtype, remat=remat, mesh=mesh), folder, provenance=str(source)
    )


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """Load tokenizer.json and its settings as a fast tokenizer, whatever class they name.

    Raises:
        PolicyError: no tokenizer.json.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise PolicyError(
            f"{folder} has no tokenizer.json; a policy needs a fast tokenizer beside it"
        )
    # Imported late: it takes seconds, and most of a run does without it.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def save_policy(
    policy: Policy,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    card: str = "",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder that transformers and `load_policy` load to equal logits.

    Args:
        policy: its weights, tokenizer, and r1re.json with template, limits and stop tokens.
        folder: absent, empty or an earlier export; appears whole or not at all.
        dtype: of the weights: float32, bfloat16 or float16.
        card: text of the model card, README.md; "" writes none.
        max_shard_bytes: above it the weights go into several files with an index.
        overwrite: replace the folder whatever it holds.

    Raises:
        HFError: the folder is in use by something else, or the dtype is not supported.
    """
    save_hf(
        policy.model,
        folder,
        dtype=dtype,
        stop_ids=policy.encoder.stop_ids,
        pad_id=policy.encoder.pad_id,
        bos_id=policy.tokenizer.bos_token_id,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        also=functools.partial(_write_words, policy, card=card),
    )


def save_words(policy: Policy, folder: str | os.PathLike) -> None:
    """Write all of a policy but its weights: what `load_policy` needs beside checkpoints.

    A run writes it once, into `policy/` of its work directory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"stop_ids": policy.encoder.stop_ids, "pad_id": policy.encoder.pad_id}
    config = hf_config(policy.config, bos_id=policy.tokenizer.bos_token_id, **ids)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    _write_words(policy, folder)


def _write_words(policy: Policy, folder: Path, *, card: str = "") -> None:
    """Write tokenizer, r1re.json and, where there is one, the model card."""
    save_tokenizer(policy.tokenizer, folder, family=policy.config.family)
    if card:
        (folder / CARD).write_text(card, "utf-8")
    recipe = {
        "template": policy.encoder.template.to_json(),
        "limits": dataclasses.asdict(policy.limits),
        "stop_ids": list(policy.encoder.stop_ids),
        "guide_sha256": dict(policy.guide_sha256),
    }
    text = json.dumps(recipe, ensure_ascii=False, indent=2) + "\n"
    (folder / RECIPE).write_text(text, "utf-8")


def _policy(model: Qwen, folder: Path, *, provenance: str) -> Policy:
    """Put tokenizer, template, limits and stop tokens of a folder around a model."""
    tokenizer = load_tokenizer(folder)
    if not (folder / RECIPE).is_file():
        encoder = PromptEncoder(tokenizer, stop_tokens=_hf_stops(folder))
        return Policy(model=model, tokenizer=tokenizer, encoder=encoder, provenance=provenance)
    recipe = read_json(folder / RECIPE)
    try:
        template = PromptTemplate.from_json(recipe["template"])
        limits = Limits(**recipe["limits"])
        stops, guides = recipe["stop_ids"], recipe["guide_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{folder / RECIPE} cannot be used: {error!r}") from None
    return Policy(
        model=model,
        tokenizer=tokenizer,
        encoder=PromptEncoder(tokenizer, template=template, stop_tokens=stops),
        limits=limits,
        guide_sha256=guides,
        provenance=provenance,
    )


def _hf_stops(folder: Path) -> list[int]:
    """Return the stop tokens that a Hugging Face folder names beside its tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            stops = read_json(folder / name).get("eos_token_id")
            if stops is not None:
                return list(stops) if isinstance(stops, list) else [stops]
    return []
