"""How well a policy extracts: precision, recall and F1 of entities and triplets, and how sure.

Counts are added up over examples before anything is divided. An answer of a wrong format has said
nothing: it lowers recall only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r1re_jax.task.metrics import sample_figures
from r1re_jax.task.schema import TripletSchema
from r1re_jax.task.semeval import Score
from r1re_jax.task.triplets.examples import Extraction, compare, ordered_triplets

KINDS = ("entities", "triplets", "strict_triplets")
"""What is counted; as `Comparison` has it."""

# Resamples drawn at once: bounds the memory of a bootstrap over thousands of examples.
_CHUNK = 200


def summarise_triplets(
    predictions: Sequence[Mapping[str, Any]],
    *,
    schema: TripletSchema,
    temperature: float,
    protocol: str,
    model: str,
    data_sha256: str,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of an evaluation, as they stand in metrics.json.

    `accuracy` and what follows from it counts an answer as right whose triplets are exactly those
    of gold. Of each of `KINDS` there are precision, recall and F1 of sample 0, the mean over the k
    samples of their F1, and its bootstrap interval over examples.

    Args:
      predictions: rows as of `r1re_jax.task.metrics.summarise`; `gold` and `predicted` are answers
        as JSON objects.
      schema: of the guide.
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
    gold = [Extraction.from_json(row["gold"]) for row in predictions]
    said = [[_said(sample) for sample in row["samples"]] for row in predictions]
    pairs = zip(gold, said, strict=True)
    counts = np.array([[_counts(one, answer, schema) for answer in row] for one, row in pairs])
    tables = _tables(counts.astype(np.float64), seed=seed)
    first = [row[0] for row in said]
    triplets = [[ordered_triplets(one, schema) for one in side] for side in (gold, first)]
    entities = [[set(one.entities) for one in side] for side in (gold, first)]
    relations = _by_name(*triplets, names=schema.names)
    return figures | {
        "entity_f1": tables["entities"]["avg_f1"],
        "triplet_f1": tables["triplets"]["avg_f1"],
        "strict_triplet_f1": tables["strict_triplets"]["avg_f1"],
        "macro_f1": float(np.mean([row["f1"] for row in relations.values()] or [0.0])),
        "micro_f1": tables["triplets"]["f1"],
        "temperature": temperature,
        "protocol": protocol,
        "model": model,
        "data_sha256": data_sha256,
        **tables,
        "per_relation": relations,
        "per_type": _by_name(*entities, names=schema.types),
    }


def _said(sample: Mapping[str, Any]) -> Extraction:
    answer = sample["predicted"]
    return Extraction() if answer is None else Extraction.from_json(answer)


def _counts(gold: Extraction, found: Extraction, schema: TripletSchema) -> list[list[int]]:
    """Matched, answered and actual of each of `KINDS`."""
    compared = compare(gold, found, schema)
    scores = (compared.entities, compared.triplets, compared.strict)
    return [[score.matched, score.answered, score.actual] for score in scores]


def _tables(counts_NKIC: np.ndarray, *, seed: int) -> dict[str, dict[str, Any]]:
    """The figures of each kind from counts [examples, samples, kinds, 3]."""
    sums_KIC = counts_NKIC.sum(axis=0)
    average_I = _f1(sums_KIC).mean(axis=0)
    low_I, high_I = _intervals(counts_NKIC, seed=seed)
    tables = {}
    for place, kind in enumerate(KINDS):
        matched, answered, actual = map(int, sums_KIC[0, place])
        score = Score(matched=matched, answered=answered, actual=actual)
        tables[kind] = _row(score) | {
            "avg_f1": float(average_I[place]),
            "ci95": [float(low_I[place]), float(high_I[place])],
        }
    return tables


def _intervals(
    counts_NKIC: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int
) -> np.ndarray:
    """Percentile bootstrap of the mean F1 of k samples over examples (Efron, 1979): [2, kinds].

    A resample is how often each example was drawn, so that its sums are one matrix product.
    """
    random = np.random.default_rng(seed)
    examples = len(counts_NKIC)
    flat = counts_NKIC.reshape(examples, -1)
    averages = []
    for start in range(0, draws, _CHUNK):
        some = min(_CHUNK, draws - start)
        times_DN = random.multinomial(examples, np.full(examples, 1 / examples), size=some)
        sums_DKIC = (times_DN @ flat).reshape(some, *counts_NKIC.shape[1:])
        averages.append(_f1(sums_DKIC).mean(axis=1))
    ends = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    return np.quantile(np.concatenate(averages), ends, axis=0)


def _f1(counts: np.ndarray) -> np.ndarray:
    """F1 in [0, 100] from matched, answered and actual in the last axis; 0 where all are."""
    matched, total = counts[..., 0], counts[..., 1] + counts[..., 2]
    return 200.0 * matched / np.maximum(total, 1)


def _by_name(
    gold: Sequence[set[tuple[str, ...]]],
    found: Sequence[set[tuple[str, ...]]],
    *,
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each name that occurs in gold; it stands last in what is said."""
    rows = {}
    for name in names:
        wanted, given = (
            [{one for one in said if one[-1] == name} for said in side] for side in (gold, found)
        )
        score = Score(
            matched=sum(len(a & b) for a, b in zip(wanted, given, strict=True)),
            answered=sum(map(len, given)),
            actual=sum(map(len, wanted)),
        )
        if score.actual:
            rows[name] = _row(score)
    return rows


def _row(score: Score) -> dict[str, float]:
    return {
        "precision": score.precision,
        "recall": score.recall,
        "f1": score.f1,
        "n": score.actual,
    }
