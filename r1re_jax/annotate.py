"""Completions of many examples under one guide: the guide computed once, batches of one shape.

What `r1re_jax.evaluate` judges and `extract` reads.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r1re_jax import hosts
from r1re_jax.model.qwen import Cache
from r1re_jax.model.tree import Level, pad_level
from r1re_jax.policy import Limits, Policy
from r1re_jax.rollout.decode import prefill
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Progress, generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.relations import Guide
from r1re_jax.task.tasks import AnyExample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """How completions are drawn.

    Attributes:
        dataset: name of the examples' set; part of every random key.
        purpose: part of every random key.
        samples: G, completions of an example.
        temperature: 0 is greedy.
        seed: of the sampling, 0 … 2³²−1.
        step: training step of the weights; part of every random key.
        batch: P, examples at a time.
        chunk: tokens between two calls of `on_chunk`.
        compaction: sizes of the batch from one to its half, as of `generate`. One: completions of
            an example or two are waited for by few rows, and each size is compiled.
        mesh: spreads the examples over the mesh's data axes.
        on_chunk: called between chunks; what it raises ends the drawing.
    """

    dataset: str
    purpose: Purpose = Purpose.EVALUATE
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    step: int = 0
    batch: int = 32
    chunk: int = 32
    compaction: int = 1
    mesh: Mesh | None = None
    on_chunk: Callable[[Progress], None] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion as text.

    Attributes:
        text: without the stop token.
        tokens: how many were drawn, the stop token included.
        truncated: whether no stop token was drawn within the limit.
    """

    text: str
    tokens: int
    truncated: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Examples under a guide, tokenised and checked; made by `read_prompts`.

    Attributes:
        guide: of all examples.
        examples: E of them.
        limits: widths of the levels.
        guide_level: tokens [S], length [].
        questions: E rows of tokens.
    """

    guide: Guide
    examples: tuple[AnyExample, ...]
    limits: Limits
    guide_level: Level
    questions: tuple[list[int], ...]


def read_prompts(
    policy: Policy, examples: Sequence[AnyExample], guide: Guide, *, limits: Limits | None = None
) -> Prompts:
    """Tokenise a guide and all examples before anything is computed.

    Args:
        policy: its encoder makes the tokens.
        examples: what to ask.
        guide: of all examples.
        limits: widths of the levels; None takes the policy's.

    Raises:
        LimitError: a guide or sentences longer than their limit, counted, the longest by name.
        PromptError: levels whose tokens are not those of the whole prompt.
    """
    encoder, limits = policy.encoder, limits or policy.limits
    encoder.check(guide, examples)
    pad = {"pad_id": encoder.pad_id}
    tokens = [encoder.guide_tokens(guide)]
    head = pad_level(tokens, limit=limits.guide, name="guide", names=[guide.title], **pad)
    questions = tuple(encoder.question_tokens(example) for example in examples)
    ids = [example.id for example in examples]
    pad_level(questions, limit=limits.question, name="question", names=ids, **pad)
    return Prompts(
        guide=guide,
        examples=tuple(examples),
        limits=limits,
        guide_level=Level(head.tokens[0], head.length[0]),
        questions=questions,
    )


def annotate(
    policy: Policy, prompts: Prompts, draw: Draw, *, first: int = 0
) -> Iterator[list[tuple[AnyExample, list[Completion]]]]:
    """Yield batches of examples with their G completions, in order.

    A completion depends on its own example and key alone: to rounding, batch size, order and
    `first` change nothing.

    Args:
        policy: what draws.
        prompts: of this policy's encoder.
        draw: how.
        first: number of the example to begin with.
    """
    if first >= len(prompts.examples):
        return
    graph, params = nnx.split(policy.model)
    # Computed once: every batch hangs its questions below the same keys and values.
    _, guide = prefill(graph, params, (prompts.guide_level,))
    for start in range(first, len(prompts.examples), draw.batch):
        which = slice(start, start + draw.batch)
        yield _batch(policy, (graph, params), guide, prompts, draw, which)


def extract(
    policy: Policy,
    examples: Sequence[AnyExample],
    guide: Guide,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 8,
    limits: Limits | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what the policy says of each example in order; gold answers are not read.

    Of a marked pair that is `{label, reasoning, text, problem}`, of a whole sentence `{entities,
    triplets, reasoning, text, problem}`, as the policy's task has it. What is asked for is None
    where the completion `text` does not give it; `problem` says why.

    Raises:
        GuideError: the guide names no entity types, and the task needs them.
        LimitError: as `read_prompts`, before anything is computed.
    """
    task = policy.encoder.task
    schema = task.schema(guide)
    prompts = read_prompts(policy, examples, guide, limits=limits)
    draw = Draw(
        dataset="extract",
        purpose=Purpose.GENERATE,
        temperature=temperature,
        seed=seed,
        batch=min(batch, len(examples)),
    )
    for rows in annotate(policy, prompts, draw):
        for example, (completion,) in rows:
            yield task.extract(completion.text, example, schema)


def _batch(
    policy: Policy,
    model: tuple[nnx.GraphDef, nnx.State],
    guide: tuple[Cache, ...],
    prompts: Prompts,
    draw: Draw,
    which: slice,
) -> list[tuple[AnyExample, list[Completion]]]:
    """Draw one batch, filled up with questions of length 0 so that all have one shape."""
    encoder, examples = policy.encoder, prompts.examples[which]
    blank = draw.batch - len(examples)
    ids = np.zeros((draw.batch, 2), np.uint32)
    ids[: len(examples)] = example_ids(draw.dataset, [example.id for example in examples])
    questions = [*prompts.questions[which], *[[]] * blank]
    rollout = generate(
        *model,
        (pad_level(questions, limit=prompts.limits.question, pad_id=encoder.pad_id),),
        keys=row_keys(draw.seed, draw.purpose, draw.step, ids, range(draw.samples)),
        settings=SamplingSettings(temperature=draw.temperature),
        limit=prompts.limits.completion,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
        chunk=draw.chunk,
        compaction=draw.compaction,
        ancestors=guide,
        on_chunk=draw.on_chunk,
        mesh=draw.mesh,
    )
    drawn = hosts.on_host((rollout.tokens, rollout.length, rollout.truncated))
    tokens_PGC, length_PG, truncated_PG = (array[: len(examples)] for array in drawn)
    return [
        (
            example,
            [
                Completion(encoder.decode(tokens[:length].tolist()), int(length), bool(truncated))
                for tokens, length, truncated in zip(*row, strict=True)
            ],
        )
        for example, *row in zip(examples, tokens_PGC, length_PG, truncated_PG, strict=True)
    ]
