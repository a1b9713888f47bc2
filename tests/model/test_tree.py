"""Padding keeps every token, and refuses by count what does not fit."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.model.tree import Level, LimitError, Tree, pad_level

TOKENS = st.lists(st.integers(0, 99), max_size=6)


@given(rows=st.lists(TOKENS, min_size=1, max_size=5), spare=st.integers(0, 3))
def test_rows_come_back_and_the_rest_is_padding(rows: list[list[int]], spare: int) -> None:
    limit = max(map(len, rows)) + spare
    level = pad_level(rows, limit=limit, pad_id=7)
    assert level.tokens.shape == (len(rows), limit)
    assert level.tokens.dtype == level.length.dtype == np.int32
    for row, padded, length in zip(rows, level.tokens, level.length, strict=True):
        assert padded[:length].tolist() == row
        assert (padded[length:] == 7).all()


def test_nesting_becomes_leading_axes() -> None:
    rows = [[[[1], [2, 3]], [[4, 5, 6], [7]], [[8], [9]]]]  # one tree, three questions, two each
    level = pad_level(rows, limit=4, pad_id=0)
    assert level.tokens.shape == (1, 3, 2, 4)
    assert level.length.tolist() == [[[1, 2], [3, 1], [1, 1]]]
    assert level.tokens[0, 1, 0].tolist() == [4, 5, 6, 0]


def test_first_row_may_be_empty() -> None:
    level = pad_level([[], [1]], limit=2, pad_id=0)
    assert level.tokens.tolist() == [[0, 0], [1, 0]]
    assert level.length.tolist() == [0, 1]


def test_nested_first_row_may_be_empty() -> None:
    level = pad_level([[[], [1, 2]], [[3], []]], limit=2, pad_id=9)
    assert level.tokens.tolist() == [[[9, 9], [1, 2]], [[3, 9], [9, 9]]]
    assert level.length.tolist() == [[0, 2], [1, 0]]


def test_too_long_rows_are_counted_and_the_longest_is_named() -> None:
    rows = [[1], [1, 2, 3], [1, 2, 3, 4]]
    with pytest.raises(
        LimitError, match=r"2 of 3 questions .* limit of 2 .*\(ex-9\) has 4.*nothing is cut"
    ):
        pad_level(rows, limit=2, pad_id=0, name="question", names=["ex-1", "ex-4", "ex-9"])


def test_ragged_nesting_is_refused() -> None:
    # Six rows would also fill a 3 x 2 batch, in wrong places.
    with pytest.raises(ValueError, match="1 rows where the first has 2"):
        pad_level([[[1], [2]], [[3]], [[4], [5], [6]]], limit=1, pad_id=0)


def test_tree_is_a_pytree() -> None:
    level = Level(np.zeros((1, 2), np.int32), np.ones(1, np.int32))
    tree = Tree(guide=level, question=level, completion=level)
    assert len(jax.tree.leaves(tree)) == 6
    assert isinstance(jax.tree.map(lambda x: x + 1, tree).guide, Level)
