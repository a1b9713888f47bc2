"""How well a policy does: Avg@k, Pass@k, macro-F1, confusion, and how sure these figures are."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r1re_jax.task.schema import Schema
from r1re_jax.task.semeval import (
    Report,
    Score,
    Way,
    check_answers,
    read_answers,
    semeval2010_macro_f1,
    semeval2010_report,
)

__all__ = [
    "MALFORMED",
    "Report",
    "Score",
    "Way",
    "avg_at_k",
    "bootstrap_interval",
    "check_answers",
    "confusion",
    "paired_bootstrap",
    "pass_at_k",
    "per_relation",
    "read_answers",
    "sample_figures",
    "semeval2010_macro_f1",
    "semeval2010_report",
    "summarise",
]

MALFORMED = "malformed"
"""Stands in a confusion for every answer that is no label of the guide."""

# Resamples drawn at once: bounds the memory of a bootstrap over thousands of examples.
_CHUNK = 200


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Mean accuracy of k samples an example, in [0, 1]; `correct` has one row an example."""
    return float(np.mean(_rates(correct)))


def pass_at_k(correct: Sequence[Sequence[bool]], *, k: int | None = None) -> float:
    """The chance that one of k samples is right, in [0, 1].

    Args:
      correct: one row of samples an example.
      k: None takes all samples; fewer gives the unbiased estimate of Chen et al. (2021,
        arXiv 2107.03374, equation 1).

    Returns:
      The mean over examples.
    """
    samples = len(_rates(correct)) and len(correct[0])
    k = samples if k is None else k
    if not 1 <= k <= samples:
        raise ValueError(f"expected 1 <= k <= {samples} samples, found k = {k}")
    ways = math.comb(samples, k)
    return float(np.mean([1.0 - math.comb(samples - sum(row), k) / ways for row in correct]))


def confusion(gold: Sequence[str], predicted: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Counts by gold label and answer; None, no label of the guide, counts as "malformed"."""
    counts: dict[str, Counter[str]] = {label: Counter() for label in sorted(set(gold))}
    for label, answer in zip(gold, predicted, strict=True):
        counts[label][MALFORMED if answer is None else answer] += 1
    return {label: dict(sorted(row.items())) for label, row in counts.items()}


def per_relation(
    gold: Sequence[str], predicted: Sequence[str | None], *, none: str | None
) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 in [0, 100] and n of each relation in gold, direction counted.

    The mean of the F1 figures without the none label is `macro_f1`.
    """
    report = semeval2010_report(gold, predicted, way=Way.OFFICIAL, none=none)
    return {
        name: {
            "precision": score.precision,
            "recall": score.recall,
            "f1": score.f1,
            "n": score.actual,
        }
        for name, score in report.classes.items()
    }


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over examples (Efron, 1979); a function of the seed.

    Args:
      values: one figure an example.
      level: coverage.
      draws: resamples.
      seed: of the resampling.

    Returns:
      The lower and the upper end.
    """
    means = _resampled_means(np.asarray(values, np.float64), draws=draws, seed=seed)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> float:
    """One-sided p-value of "the mean of `after` is above that of `before`" on the same examples.

    The share of resamples of examples in which the mean difference is not positive, with one
    added to count and draws (Efron and Tibshirani, 1993, chapter 16; Davison and Hinkley, 1997).

    Args:
      before: one figure an example.
      after: the same examples in the same order.
      draws: resamples.
      seed: of the resampling.

    Returns:
      p in (0, 1].
    """
    if len(before) != len(after):
        raise ValueError(f"expected the same examples twice, found {len(before)} and {len(after)}")
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    means = _resampled_means(difference, draws=draws, seed=seed)
    # Sums of binary fractions such as 1/3 may miss a difference of exactly zero by rounding.
    return float((1 + np.count_nonzero(means <= 1e-12)) / (draws + 1))


def summarise(
    predictions: Sequence[Mapping[str, Any]],
    *,
    schema: Schema,
    temperature: float,
    protocol: str,
    model: str,
    data_sha256: str,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of an evaluation, as they stand in metrics.json.

    `accuracy`, `macro_f1`, `micro_f1`, `per_relation` and `confusion` are of sample 0, the others
    of all samples. Where an example has several gold labels, a correct answer counts under the one
    that it gave.

    Args:
      predictions: rows `{id, gold, samples: [{predicted, correct, format_ok, reward, tokens,
        truncated, …}]}`, all with k samples.
      schema: its none label is left out of the averages.
      temperature: of sampling; copied, as the next three are.
      protocol: which split and rules these figures are of.
      model: what was evaluated.
      data_sha256: of the data file.
      seed: of the bootstrap.

    Returns:
      A JSON object.

    Raises:
      ValueError: no predictions, or rows with different numbers of samples.
    """
    figures = sample_figures(predictions, seed=seed)
    first = [row["samples"][0] for row in predictions]
    predicted = [sample["predicted"] for sample in first]
    gold = [
        sample["predicted"] if sample["correct"] else row["gold"]
        for row, sample in zip(predictions, first, strict=True)
    ]
    report = semeval2010_report(gold, predicted, way=Way.OFFICIAL, none=schema.none)
    return figures | {
        "macro_f1": report.macro_f1,
        "micro_f1": report.micro.f1,
        "temperature": temperature,
        "protocol": protocol,
        "model": model,
        "data_sha256": data_sha256,
        "per_relation": per_relation(gold, predicted, none=schema.none),
        "confusion": confusion(gold, predicted),
    }


def sample_figures(predictions: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """The figures that need no more than whether a sample is right: those of every task.

    Args:
      predictions: as `summarise` takes them.
      seed: of the bootstrap.

    Raises:
      ValueError: no predictions, or rows with different numbers of samples.
    """
    correct = [[bool(sample["correct"]) for sample in row["samples"]] for row in predictions]
    rates = _rates(correct)
    samples = [sample for row in predictions for sample in row["samples"]]
    return {
        "accuracy": sum(row[0] for row in correct) / len(correct),
        "avg_at_k": float(np.mean(rates)),
        "pass_at_k": pass_at_k(correct),
        "ci95": list(bootstrap_interval(rates, seed=seed)),
        "format_rate": _mean_of(samples, "format_ok"),
        "mean_reward": _mean_of(samples, "reward"),
        "mean_tokens": _mean_of(samples, "tokens"),
        "truncated_rate": _mean_of(samples, "truncated"),
        "n": len(predictions),
        "k": len(correct[0]),
    }


def _rates(correct: Sequence[Sequence[bool]]) -> list[float]:
    """The share of right samples by example; refuses rows of different lengths."""
    lengths = sorted({len(row) for row in correct})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(
            "expected at least one example and equally many samples for all, found "
            f"{len(correct)} examples with {lengths or 'no'} samples"
        )
    return [sum(row) / lengths[0] for row in correct]


def _mean_of(samples: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([sample[key] for sample in samples]))


def _resampled_means(values_N: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Means of `draws` samples of the examples with replacement, float64 [draws]."""
    if not len(values_N) or draws < 1:
        raise ValueError(f"expected values and draws, found {len(values_N)} and {draws}")
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, _CHUNK):
        some = min(_CHUNK, draws - start)
        means.append(values_N[random.integers(len(values_N), size=(some, len(values_N)))].mean(1))
    return np.concatenate(means)
