"""Which groups of a GRPO step are kept, against a choice written out in plain lists."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r1re_jax.model.tree import Level
from r1re_jax.rollout.rollout import Rollout
from r1re_jax.train.groups import Groups, as_examples, join
from tests.train.world import examples


def _groups(reward_NPG: np.ndarray, *, first: int = 0) -> Groups:
    """Groups whose every array says which question it belongs to: numbers from `first` on."""
    trees, questions, samples = reward_NPG.shape
    number_NP = first + np.arange(trees * questions).reshape(trees, questions)
    number_NPG = np.broadcast_to(number_NP[..., None], reward_NPG.shape)
    tokens = np.broadcast_to(number_NPG[..., None], (*reward_NPG.shape, 5))
    return Groups(
        examples=as_examples([examples(questions)] * trees),
        question=Level(np.broadcast_to(number_NP[..., None], (trees, questions, 3)), number_NP),
        rollout=Rollout(
            tokens=tokens, length=number_NPG, logp=tokens * 0.5, truncated=number_NPG % 2 == 0
        ),
        verdicts=number_NPG.astype(object),
        reward=reward_NPG,
        parts=reward_NPG[..., None],
        overlong=number_NPG * 0.25,
    )


REWARDS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 3)),
    elements=st.sampled_from([np.float32(-0.5), np.float32(3)]),
)


@given(REWARDS, st.data())
def test_groups_with_signal_come_first_and_order_stays(rewards: np.ndarray, data: object) -> None:
    keep = data.draw(st.integers(1, rewards.shape[1]))
    groups = _groups(rewards)
    chosen = groups.choose(keep)
    for tree, row in enumerate(rewards):
        telling = [place for place, group in enumerate(row) if len(set(group.tolist())) > 1]
        silent = [place for place in range(len(row)) if place not in telling]
        places = sorted((telling + silent)[:keep])
        expected = [tree * len(row) + place for place in places]
        assert chosen.question.length[tree].tolist() == expected
        np.testing.assert_array_equal(chosen.reward[tree], row[places])
    whole = chosen.question.length
    for array in (chosen.question.tokens, chosen.rollout.length, chosen.rollout.tokens):
        np.testing.assert_array_equal(array.reshape(*whole.shape, -1)[..., 0], whole)
    np.testing.assert_array_equal(chosen.rollout.logp[..., 0, 0], whole * 0.5)
    np.testing.assert_array_equal(chosen.rollout.truncated[..., 0], whole % 2 == 0)
    np.testing.assert_array_equal(chosen.verdicts[..., 0].astype(int), whole)
    np.testing.assert_array_equal(chosen.parts[..., 0], chosen.reward)
    np.testing.assert_array_equal(chosen.overlong[..., 0], whole * 0.25)


@given(REWARDS)
def test_all_of_them_are_kept_as_they_are(rewards: np.ndarray) -> None:
    groups = _groups(rewards)
    chosen = groups.choose(rewards.shape[1])
    np.testing.assert_array_equal(chosen.reward, rewards)
    np.testing.assert_array_equal(chosen.question.length, groups.question.length)
    assert chosen.examples.tolist() == groups.examples.tolist()


def test_drawings_are_joined_by_question() -> None:
    one, other = (_groups(np.zeros((2, 3, 2), np.float32), first=first) for first in (0, 100))
    both = join([one, other])
    assert both.question.length.tolist() == [[0, 1, 2, 100, 101, 102], [3, 4, 5, 103, 104, 105]]
    assert both.rollout.tokens.shape == (2, 6, 2, 5)
    assert both.examples.shape == (2, 6)
