"""All options of the algorithm in one run: none gets in another's way, nor in a restart's."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from r1re_jax.policy_files import load_policy
from r1re_jax.rl.correction import LOGP_DIFFERENCE
from r1re_jax.rollout.rollout import Rollout, generate
from r1re_jax.task import tasks
from r1re_jax.task.rewards import Verdict, relation_reward
from r1re_jax.task.templates import GuideInPrompt
from r1re_jax.train import drawing as drawing_module
from tests.tiny import GUIDE
from tests.train import world
from tests.train.world import StopAt, assert_bit_equal, checkpoint_params, metrics, train


def test_a_run_with_all_options_resumes_bit_by_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(text: str, *args: object, **more: object) -> Verdict:
        real = relation_reward(text, *args, **more)
        number = sum(text.encode())
        return dataclasses.replace(real, format_ok=number % 2 == 0, correct=number % 3 == 0)

    def draw(*args: Any, **more: Any) -> Rollout:
        """Random weights hardly ever stop: half of what was cut counts as ended there."""
        rollout = jax.device_get(generate(*args, **more))
        cut = rollout.truncated & (np.arange(rollout.truncated.shape[-1]) % 2 == 0)
        return dataclasses.replace(rollout, truncated=cut)

    monkeypatch.setattr(tasks, "relation_reward", judge)
    monkeypatch.setattr(drawing_module, "generate", draw)
    inputs = world.write_inputs(tmp_path)
    (inputs / "other.md").write_text(GUIDE.replace("# Tiny", "# Other"))
    extra = {"kind": "jsonl", "path": str(inputs / "train.jsonl"), "guide": f"{inputs}/other.md"}
    settings = world.settings(
        inputs,
        model__parity_tokens=0,
        sft__steps=1,
        reward={"wrong": -1.0},
        data__guide_in_prompt="none",
        data__extra={"other": {**extra, "weight": 2.0}},
        grpo__steps=3,
        grpo__trees=2,
        grpo__questions=4,
        grpo__group=4,
        grpo__refill=1,
        grpo__micro_batch=4,
        grpo__inner_iterations=2,
        grpo__rewards={"format": 0.5, "answer": 2.0, "length": 0.1},
        grpo__overlong_buffer=20,
        grpo__mask_truncated=True,
        grpo__clip_low=0.001,
        grpo__clip_high=0.001,
        grpo__dual_clip=1.001,
        grpo__entropy_coefficient=0.01,
        grpo__reference={"every": 1, "decay": 0.5},
        grpo__kl_coefficient=0.1,
        grpo__correction="sequence_truncate",
        grpo__quantise={"weights": "int8", "cache": "int8"},
    )
    train(settings, tmp_path / "whole")
    stop = StopAt("reward", 6)
    assert train(settings, tmp_path / "stopped", poll=stop.poll, progress=stop).stopped is not None
    assert train(settings, tmp_path / "stopped").step == 4
    whole, stopped = (tmp_path / of for of in ("whole", "stopped"))
    assert metrics(whole) == metrics(stopped)
    for item in ("params", "reference"):
        assert_bit_equal(*(checkpoint_params(of, 4, item=item) for of in (whole, stopped)))
    rows = metrics(whole)[1:]
    last = rows[-1]
    assert all(0 < row["completions/clipped_ratio"] < 1 for row in rows), (
        "some are masked, and not all"
    )
    on = (
        "clip_ratio/dual_mean",
        "entropy_bonus",
        "rewards/overlong/mean",
        "rewards/format/mean",
        "rewards/length/mean",
    )
    assert all(name in last for name in (*on, "sampling/ess", "groups_drawn"))
    assert last["entropy_bonus"] > 0 and last["kl"] > 0
    assert last[f"{LOGP_DIFFERENCE}/mean"] > 1e-4, "the sampler rounds"
    hashes = json.loads((whole / "policy" / "r1re.json").read_text())["guide_sha256"]
    assert sorted(hashes) == ["Other", "Tiny"]
    asked = load_policy(whole, step=4).encoder.template.guide
    assert asked is GuideInPrompt.NONE, "it is asked as it was trained"
