"""What a GRPO step says of itself: figures for metrics.jsonl, rows for completions/<step>.jsonl."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r1re_jax.rl.correction import LOGP_DIFFERENCE, correction_metrics
from r1re_jax.rollout.rollout import Rollout
from r1re_jax.task.relations import Example
from r1re_jax.train.groups import Groups
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.update import Gradient

# Sums of the loss function that are reported as means over tokens, where they are there, and as
# what. Names are TRL's (GRPOTrainer) wherever it reports the same, so that runs lie side by side.
TOKEN_MEANS = {
    "entropy": "entropy",
    "ratio": "ratio",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "dual_clip": "clip_ratio/dual_mean",
    "old_kl": "old_kl",
    "kl": "kl",
}
# Sums that are part of the loss, reported as they are.
PARTS_OF_LOSS = ("entropy_bonus",)


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        """Start."""
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str, *, after: Any = None) -> None:
        """Name what happened since the last lap; laps of one name add up.

        Args:
            name: of the part.
            after: arrays to wait for, whose computation belongs to it.
        """
        jax.block_until_ready(after)
        now = time.perf_counter()
        key = f"step_time/{name}"
        self._laps[key] = self._laps.get(key, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the whole until now and its parts; `step_time/other` has no name of its own."""
        now = time.perf_counter()
        return {
            "step_time": now - self._start,
            **self._laps,
            "step_time/other": now - self._last,
        }


def completion_rows(
    groups: Groups, advantage_NPG: np.ndarray, *, parts: Sequence[str] = ()
) -> tuple[dict[str, Any], ...]:
    """Return one row per question: `{id, gold, samples: [{text, predicted, …, advantage}]}`.

    Args:
        groups: of the step.
        advantage_NPG: of their completions.
        parts: names of the rewards that were compared by themselves; a sample then has `rewards`.
    """
    trees, questions, samples = groups.reward.shape
    return tuple(
        {
            "id": groups.examples[tree, question].id,
            "gold": groups.examples[tree, question].answer,
            "samples": [
                _sample(groups, (tree, question, sample), advantage_NPG, parts)
                for sample in range(samples)
            ],
        }
        for tree in range(trees)
        for question in range(questions)
    )


def _sample(
    groups: Groups,
    where: tuple[int, int, int],
    advantage_NPG: np.ndarray,
    parts: Sequence[str],
) -> dict[str, Any]:
    verdict = groups.verdicts[where]
    named = dict(zip(parts, groups.parts[where].tolist(), strict=True)) if parts else {}
    return {
        "text": verdict.text,
        "predicted": verdict.predicted,
        "correct": verdict.correct,
        "format_ok": verdict.format_ok,
        "reward": verdict.reward,
        "tokens": int(groups.rollout.length[where]),
        "truncated": bool(groups.rollout.truncated[where]),
        "advantage": float(advantage_NPG[where]),
        **({"rewards": named} if named else {}),
    }


def drawing_metrics(groups: Groups, kept: Groups, places_NP: np.ndarray) -> dict[str, float]:
    """Return how many groups were drawn, and what became of them.

    Args:
        groups: all that were drawn.
        kept: those that the step trains on.
        places_NP: which of `groups` they are.
    """
    drawn, used = groups.signal.size, kept.signal.size
    return {
        "groups_drawn": float(drawn),
        "groups_dropped": float(drawn - used),
        "groups_refilled": float((places_NP >= places_NP.shape[1]).sum()),
        "frac_kept_zero_std": float(1 - kept.signal.mean()),
    }


def sampling_metrics(groups: Groups, settings: GRPOSettings) -> dict[str, float]:
    """Return means over all completions drawn, and how far rewards differ within groups."""
    verdicts = groups.verdicts.ravel()
    penalty = {"rewards/overlong/mean": float(groups.overlong.mean())}
    return {
        **_rewards(groups, settings.rewards),
        **(penalty if settings.overlong_buffer else {}),
        "reward": float(groups.reward.mean()),
        "reward_std": float(groups.reward.std(ddof=1)),
        "reward_group_std": float(groups.reward.std(axis=-1, ddof=1).mean()),
        "frac_reward_zero_std": float(1 - groups.signal.mean()),
        "accuracy": float(np.mean([verdict.correct for verdict in verdicts])),
        "format_rate": float(np.mean([verdict.format_ok for verdict in verdicts])),
        **_lengths(groups.rollout),
        **_relations(groups),
        **{
            name: float(np.mean([verdict.figures[name] for verdict in verdicts]))
            for name in verdicts[0].figures
        },
    }


def _rewards(groups: Groups, names: Sequence[str]) -> dict[str, float]:
    """Mean and deviation of each reward that is compared by itself, where any is."""
    parts_RX = np.moveaxis(groups.parts, -1, 0).reshape(groups.parts.shape[-1], -1)
    return {
        f"rewards/{name}/{figure}": float(value)
        for name, part_X in zip(names, parts_RX, strict=False)
        for figure, value in (("mean", part_X.mean()), ("std", part_X.std(ddof=1)))
    }


def _lengths(rollout: Rollout) -> dict[str, float]:
    """Tokens of completions; of those that ended by themselves too, where there are any."""
    ended = rollout.length[~rollout.truncated]
    found = (
        {"": rollout.length.ravel(), "terminated_": ended} if ended.size else {"": rollout.length}
    )
    return {
        f"completions/{figure}_{name}length": float(getattr(length, figure)())
        for name, length in found.items()
        for figure in ("mean", "min", "max")
    } | {"completions/clipped_ratio": float(rollout.truncated.mean())}


def _relations(groups: Groups) -> dict[str, float]:
    """Accuracy and reward by the relation that is right, directions together; none of triplets."""
    by_relation: dict[str, list[tuple[int, ...]]] = {}
    for where in np.ndindex(groups.examples.shape):
        example = groups.examples[where]
        if isinstance(example, Example):
            by_relation.setdefault(example.label.split("(")[0], []).append(where)
    found = {}
    for relation, places in sorted(by_relation.items()):
        right = [verdict.correct for where in places for verdict in groups.verdicts[where]]
        rewards = [groups.reward[where].mean() for where in places]
        found[f"relations/{relation}/accuracy"] = float(np.mean(right))
        found[f"relations/{relation}/reward"] = float(np.mean(rewards))
    return found


def update_metrics(gradients: Sequence[Gradient]) -> dict[str, float]:
    """Means over the inner iterations; the gap between sampler and trainer is the first one's."""
    means: dict[str, list[float]] = {}
    for gradient in gradients:
        tokens = max(gradient.sums["tokens"], 1)
        sums = gradient.sums
        by_token = {new: sums[name] / tokens for name, new in TOKEN_MEANS.items() if name in sums}
        for name, value in by_token.items():
            means.setdefault(name, []).append(value)
        clipped = by_token["clip_ratio/low_mean"] + by_token["clip_ratio/high_mean"]
        means.setdefault("clip_ratio/region_mean", []).append(clipped)
        whole = {name: gradient.sums[name] for name in PARTS_OF_LOSS if name in gradient.sums}
        whole |= {"loss": gradient.loss, "grad_norm": gradient.norm}
        for name, value in whole.items():
            means.setdefault(name, []).append(value)
    first = gradients[0].sums
    return {name: float(np.mean(values)) for name, values in means.items()} | {
        f"{LOGP_DIFFERENCE}/mean": first["logp_gap"] / max(first["tokens"], 1),
        f"{LOGP_DIFFERENCE}/max": first["logp_gap_max"],
        **correction_metrics(first),
    }
