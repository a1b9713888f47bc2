"""How good a policy is on a set of examples: k samples each, judged, streamed to a file, summed up.

A sample's randomness depends on (seed, step, set name, example id, sample, token) alone, so batch
size, order and interruptions change no figure beyond rounding. `r1re_jax.predictions` says what the
folder of an evaluation holds.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from r1re_jax import hosts
from r1re_jax.annotate import Completion, Draw, Prompts, annotate, read_prompts
from r1re_jax.files import place
from r1re_jax.policy import Limits, Policy
from r1re_jax.predictions import (
    METRICS,
    EvaluationError,
    Growing,
    Row,
    begin,
    replace,
    sha256,
)
from r1re_jax.rollout.rollout import Progress
from r1re_jax.task.relations import Guide
from r1re_jax.task.tasks import AnyExample, Task

GREEDY = "greedy"
# Numbers of each parameter that tell one policy's weights from another's.
PROBES = 64


def evaluate(
    policy: Policy,
    examples: Sequence[AnyExample],
    guide: Guide,
    *,
    name: str,
    out: str | os.PathLike | None = None,
    samples: int = 4,
    temperature: float | None = None,
    greedy: bool = False,
    seed: int = 0,
    step: int = 0,
    batch: int = 32,
    chunk: int = 32,
    limits: Limits | None = None,
    protocol: str = "",
    model: str = "",
    data_sha256: str = "",
    mesh: Mesh | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_chunk: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Sample and judge completions of every example; return what metrics.json says.

    Args:
        policy: what is evaluated; its encoder knows the task, which judges and sums up.
        examples: with gold labels; ids differ.
        guide: of all examples.
        name: of the set, for random keys and messages.
        out: folder for the files; an unfinished evaluation there goes on. None writes nothing.
        samples: k, completions of each example.
        temperature: None is 0 for one sample, 1 for more.
        greedy: also draw one completion at temperature 0, into `out`/greedy; adds
            `greedy_accuracy` and changes no other figure.
        seed: of the sampling, 0 … 2³²−1.
        step: training step of the weights.
        batch: examples at a time; the last batch is filled up, so that one program serves all.
        chunk: tokens between two calls of `on_chunk`.
        limits: widths of the levels; None takes the policy's. Longer prompts are refused.
        protocol: which split and rules the figures are of; copied.
        model: what the policy is called; copied.
        data_sha256: of the data file; "" takes a hash of the examples.
        mesh: spreads the examples over the mesh's data axes.
        on_batch: called with (examples done, examples in all) after each batch.
        on_chunk: called between chunks of a rollout. What either raises ends the evaluation.

    Raises:
        EvaluationError: nothing to evaluate, settings without meaning, or a folder that holds an
            evaluation of another policy, data or settings.
        DataError: a gold label that the guide lacks.
        GuideError: the guide names no entity types, and the task needs them.
        LimitError: guide or sentences longer than their limit, counted, the longest by name.
    """
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    task = policy.encoder.task
    _check(examples, task, guide, samples=samples, temperature=temperature, batch=batch)
    prompts = read_prompts(policy, examples, guide, limits=limits)
    shared = {"seed": seed, "step": step, "batch": batch, "chunk": chunk, "mesh": mesh}
    draw = Draw(dataset=name, samples=samples, temperature=temperature, on_chunk=on_chunk, **shared)
    folder = None if out is None else place(out)
    rows = _predictions(policy, prompts, draw, folder, on_batch)
    metrics = task.summarise(
        rows,
        task.schema(guide),
        temperature=temperature,
        protocol=protocol,
        model=model,
        data_sha256=data_sha256 or examples_sha256(examples),
    )
    most = majority_accuracy(examples)
    metrics |= {"majority_accuracy": most, "name": name, "step": step, "seed": seed}
    if greedy:
        once = dataclasses.replace(draw, samples=1, temperature=0.0)
        if once != draw:
            rows = _predictions(policy, prompts, once, folder and folder / GREEDY, on_batch)
        metrics["greedy_accuracy"] = _accuracy(rows)
    if folder is not None:
        replace(folder / METRICS, json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
    return metrics


def _accuracy(rows: Sequence[Row]) -> float:
    """Share of rows whose first sample is right."""
    return sum(row["samples"][0]["correct"] for row in rows) / len(rows)


def majority_accuracy(examples: Sequence[AnyExample]) -> float:
    """Accuracy of always giving the answer that is right most often."""
    counts = Counter(answer for example in examples for answer in example.gold)
    return max(counts.values()) / len(examples)


def examples_sha256(examples: Sequence[AnyExample]) -> str:
    """Hash of ids, questions and gold answers."""
    return sha256([[e.id, e.question, e.answer, sorted(e.gold)] for e in examples])


def weights_fingerprint(params: nnx.State) -> str:
    """Return a hash of some numbers of every parameter: other weights, another hash.

    A few numbers spread over each parameter say as much as all of them, since an update moves every
    one, and they are quickly fetched from sharded arrays.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        probes = np.linspace(0, leaf.size - 1, min(PROBES, leaf.size)).astype(np.int64)
        values = hosts.on_host(leaf[np.unravel_index(probes, leaf.shape)]).astype(np.float32)
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def _check(
    examples: Sequence[AnyExample],
    task: Task,
    guide: Guide,
    *,
    samples: int,
    temperature: float,
    batch: int,
) -> None:
    """Refuse what has no answer."""
    schema = task.schema(guide)
    if not examples:
        raise EvaluationError("there are no examples to evaluate on; give at least one")
    if samples < 1 or batch < 1:
        raise EvaluationError(f"samples is {samples} and batch is {batch}; both must be at least 1")
    if temperature == 0 and samples > 1:
        raise EvaluationError(
            f"{samples} samples at temperature 0 would all be equal; ask for 1, or a higher"
            " temperature"
        )
    for example in examples:
        if not example.answer:
            raise EvaluationError(f"example {example.id} has no gold label to judge answers by")
        task.check(example, schema)
    counts = Counter(example.id for example in examples)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise EvaluationError(
            f"{len(repeated)} ids occur more than once, the first is {repeated[0]!r}; ids must"
            " differ, since randomness follows them"
        )


def _asked(policy: Policy, prompts: Prompts, draw: Draw) -> dict[str, Any]:
    """Everything that a prediction depends on; equal for predictions that may stand in one file."""
    guide_tokens = prompts.guide_level.tokens[: prompts.guide_level.length].tolist()
    return {
        "weights": weights_fingerprint(nnx.state(policy.model)),
        "dtype": jnp.dtype(policy.model.dtype).name,
        "guide": prompts.guide.sha256,
        "examples": examples_sha256(prompts.examples),
        "prompts": sha256([guide_tokens, *prompts.questions]),
        "rewards": dataclasses.asdict(policy.encoder.task.totals),
        "completion_limit": prompts.limits.completion,
        "name": draw.dataset,
        "samples": draw.samples,
        "temperature": draw.temperature,
        "seed": draw.seed,
        "step": draw.step,
    }


def _predictions(
    policy: Policy,
    prompts: Prompts,
    draw: Draw,
    folder: epath.Path | None,
    on_batch: Callable[[int, int], None] | None,
) -> list[Row]:
    """All rows in the order of the examples: those in the folder, and the others drawn now."""
    task, rows = policy.encoder.task, []
    schema = task.schema(prompts.guide)
    if folder is not None:
        rows = begin(folder, _asked(policy, prompts, draw), prompts.examples)
        hosts.meet(f"evaluation in {folder}")  # all have read it before one of them writes
    with contextlib.closing(Growing(folder)) as growing:
        for batch in annotate(policy, prompts, draw, first=len(rows)):
            judged = [_row(*pair, task, schema) for pair in batch]
            growing.append(judged)
            rows += judged
            if on_batch is not None:
                on_batch(len(rows), len(prompts.examples))
    return rows


def _row(example: AnyExample, completions: Sequence[Completion], task: Task, schema: Any) -> Row:
    """One line of predictions.jsonl."""
    samples = []
    for completion in completions:
        verdict = task.judge(completion.text, example, schema)
        samples.append(
            {
                "text": completion.text,
                "predicted": verdict.predicted,
                "correct": verdict.correct,
                "format_ok": verdict.format_ok,
                "reward": verdict.reward,
                "tokens": completion.tokens,
                "truncated": completion.truncated,
            }
        )
    return {"id": example.id, "gold": example.answer, "samples": samples}
