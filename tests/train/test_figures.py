"""Figures of a step that its other tests do not reach."""

import dataclasses

import numpy as np

from r1re_jax.rollout.rollout import Rollout
from r1re_jax.train.figures import _lengths


def test_lengths_of_completions_that_ended_are_told_apart() -> None:
    length = np.array([[[2, 5], [9, 9]]])
    cut = np.array([[[False, False], [True, True]]])
    rollout = Rollout(tokens=None, logp=None, length=length, truncated=cut)
    found = _lengths(rollout)
    assert (found["completions/min_length"], found["completions/max_length"]) == (2, 9)
    assert found["completions/mean_terminated_length"] == 3.5
    assert found["completions/max_terminated_length"] == 5
    none = _lengths(dataclasses.replace(rollout, truncated=np.ones_like(cut)))
    assert not any("terminated" in name for name in none) and none["completions/clipped_ratio"] == 1
