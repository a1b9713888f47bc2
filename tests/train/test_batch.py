"""Micro-batches tile a step, and what does not fit is refused by name."""

import dataclasses
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from r1re_jax.model.tree import Level, LimitError, Tree
from r1re_jax.task.lessons import Lesson
from r1re_jax.train.batch import (
    blocks,
    check_batches,
    check_mesh,
    completion_level,
    grpo_blocks,
    prompt_levels,
)
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.settings import SFTSettings
from tests.tiny import tiny_examples, tiny_guide, tiny_policy
from tests.train.world import LIMITS, mesh_of, settings, write_inputs


@hypothesis.given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_blocks_cover_every_completion_once(
    trees: int, questions: int, data: st.DataObject
) -> None:
    sizes = [m for m in range(questions) if m == 0 or questions % m == 0]
    sizes += [k * questions for k in range(1, trees + 1) if trees % k == 0]
    micro_batch = data.draw(st.sampled_from(sizes))
    SFTSettings(trees=trees, questions=questions, micro_batch=micro_batch)
    group = data.draw(st.integers(2, 4))
    deep = data.draw(st.sampled_from([m for m in range(group + 1) if m == 0 or group % m == 0]))
    sizes = {"trees": trees, "questions": questions, "group": group}
    of = GRPOSettings(**sizes, micro_batch=micro_batch, micro_group=deep)
    number = np.arange(trees * questions * group).reshape(trees, questions, group)
    parts = [block.of(number) for block in grpo_blocks(of)]
    assert sorted(np.concatenate([part.ravel() for part in parts])) == [*range(number.size)]
    assert {part.size for part in parts} == {(micro_batch or trees * questions) * (deep or group)}
    assert len({part.shape for part in parts}) == 1, "one shape, one program"


def test_a_block_of_a_tree_keeps_questions_under_their_guide() -> None:
    def level(*shape: int) -> Level:
        return Level(np.arange(np.prod(shape)).reshape(shape), np.zeros(shape[:-1], np.int32))

    tree = Tree(level(4, 3), level(4, 2, 3), level(4, 2, 5, 3))
    block = [*blocks(4, 2, 4, group=5)][1].of_tree(tree)
    np.testing.assert_array_equal(block.guide.tokens, tree.guide.tokens[2:4])
    np.testing.assert_array_equal(block.completion.tokens, tree.completion.tokens[2:4])
    block = [*blocks(4, 2, 1, group=5, micro_group=5)][5].of_tree(tree)
    np.testing.assert_array_equal(block.guide.tokens, tree.guide.tokens[2:3])
    np.testing.assert_array_equal(block.question.tokens, tree.question.tokens[2:3, 1:2])


def test_prompts_and_completions_are_encoded_and_padded() -> None:
    encoder = tiny_policy().encoder
    lesson = Lesson(tiny_guide(), tuple(tiny_examples(2)))
    guide, question = prompt_levels([lesson, lesson], encoder, LIMITS)
    assert guide.tokens.shape == (2, LIMITS.guide)
    assert question.tokens.shape == (2, 2, LIMITS.question)
    tokens = encoder.question_tokens(lesson.examples[1])
    assert question.tokens[1, 1, : question.length[1, 1]].tolist() == tokens
    completion = completion_level([["tea"], ["cat"]], encoder, LIMITS, names=["a", "b"])
    assert completion.tokens.shape == (2, 1, 1, LIMITS.completion)
    stop = completion.tokens[0, 0, 0, completion.length[0, 0, 0] - 1]
    assert stop == encoder.stop_ids[0], "the stop token is trained"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"guide": 5}, "1 of 1 guides"), ({"question": 8}, r"2 of 2 questions .* \(e1\)")],
)
def test_what_is_too_long_is_counted_and_named(limits: dict, expected: str) -> None:
    lesson = Lesson(tiny_guide(), tuple(tiny_examples(2)))
    with pytest.raises(LimitError, match=expected):
        prompt_levels([lesson], tiny_policy().encoder, dataclasses.replace(LIMITS, **limits))


def test_questions_that_a_mesh_cannot_share_evenly_are_refused() -> None:
    mesh = mesh_of(2, 2, 2)
    check_mesh(1, 8, 0, mesh=mesh, phase="grpo")
    check_mesh(2, 8, 4, mesh=mesh, phase="grpo")
    with pytest.raises(ValueError, match="grpo: 2 questions of a tree are computed at a time, by"):
        check_mesh(1, 8, 2, mesh=mesh, phase="grpo")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_completions_must_suit_the_devices_that_share_their_positions(
    tmp_path: pathlib.Path,
) -> None:
    inputs, mesh = write_inputs(tmp_path), mesh_of(1, 1, 1, 2)
    check_batches(settings(inputs, mesh={"fsdp": 1, "sequence": 2}), mesh=mesh)
    sizes = {"guide": 400, "question": 48, "completion": 55}
    odd = settings(inputs, mesh={"fsdp": 1, "sequence": 2}, limits=sizes)
    with pytest.raises(
        ValueError, match=r" limits.completion=55 cannot .* the next that can is 56"
    ):
        check_batches(odd, mesh=mesh)
    odd = settings(inputs, mesh={"fsdp": 1, "sequence": 2}, data__train__limits=sizes)
    with pytest.raises(ValueError, match=r" data.train.limits.completion=55 cannot"):
        check_batches(odd, mesh=mesh)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_rollout_must_suit_the_mesh_that_draws(tmp_path: pathlib.Path) -> None:
    """Sharing heads among fewer devices there leaves more of them to share the questions."""
    sizes = {"data": 1, "fsdp": 2, "tensor": 4}
    inputs = write_inputs(tmp_path)
    check_batches(settings(inputs, mesh=sizes), mesh=mesh_of(1, 2, 4))
    fewer = settings(inputs, mesh=sizes | {"drawing_tensor": 1})
    with pytest.raises(ValueError, match=r"grpo: 2 questions .* by 8 devices .*drawing_tensor"):
        check_batches(fewer, mesh=mesh_of(1, 2, 4))
