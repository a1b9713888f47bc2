"""What a GRPO step says of itself: figures for metrics.jsonl, rows for completions/<step>.jsonl."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1re_jax.rollout.rollout import Rollout
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.rewards import Verdict
from r1re_jax.train.update import Gradient


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        """Start."""
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Name what happened since the last lap."""
        now = time.perf_counter()
        self._laps[f"seconds_{name}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the whole and its parts."""
        return {"seconds": self._last - self._start, **self._laps}


def completion_rows(
    lessons: Sequence[Lesson],
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
    rollout: Rollout,
    advantage_NPG: np.ndarray,
) -> tuple[dict[str, Any], ...]:
    """Return one row per question: `{id, gold, samples: [{text, predicted, …, advantage}]}`."""
    samples = [
        {
            "text": text,
            "predicted": verdict.predicted,
            "correct": verdict.correct,
            "format_ok": verdict.format_ok,
            "reward": verdict.reward,
            "tokens": int(length),
            "truncated": bool(truncated),
            "advantage": float(advantage),
        }
        for text, verdict, length, truncated, advantage in zip(
            texts,
            verdicts,
            rollout.length.reshape(-1),
            rollout.truncated.reshape(-1),
            advantage_NPG.reshape(-1),
            strict=True,
        )
    ]
    group = advantage_NPG.shape[-1]
    examples = [example for lesson in lessons for example in lesson.examples]
    return tuple(
        {
            "id": example.id,
            "gold": example.label,
            "samples": samples[i * group : (i + 1) * group],
        }
        for i, example in enumerate(examples)
    )


def sampling_metrics(
    reward_NPG: np.ndarray, verdicts: Sequence[Verdict], rollout: Rollout
) -> dict[str, float]:
    """Return means over the step's completions, and how far rewards differ within groups."""
    return {
        "reward": float(reward_NPG.mean()),
        "reward_std": float(reward_NPG.std(axis=-1, ddof=1).mean()),
        "frac_reward_zero_std": float((np.ptp(reward_NPG, axis=-1) == 0).mean()),
        "accuracy": float(np.mean([verdict.correct for verdict in verdicts])),
        "format_rate": float(np.mean([verdict.format_ok for verdict in verdicts])),
        "length": float(rollout.length.mean()),
        "length_max": float(rollout.length.max()),
        "truncated": float(rollout.truncated.mean()),
    }


def update_metrics(gradients: Sequence[Gradient]) -> dict[str, float]:
    """Means over the inner iterations; the gap between sampler and trainer is the first one's."""
    means: dict[str, list[float]] = {}
    for gradient in gradients:
        tokens = max(gradient.sums["tokens"], 1)
        for name in ("entropy", "ratio", "clip_low", "clip_high", "old_kl", "kl"):
            if name in gradient.sums:
                means.setdefault(name, []).append(gradient.sums[name] / tokens)
        for name, value in (("loss", gradient.loss), ("grad_norm", gradient.norm)):
            means.setdefault(name, []).append(value)
    first = gradients[0].sums
    return {name: float(np.mean(values)) for name, values in means.items()} | {
        "logp_gap": first["logp_gap"] / max(first["tokens"], 1),
        "logp_gap_max": first["logp_gap_max"],
    }
