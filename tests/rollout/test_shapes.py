"""The shapes of a rollout's batch: few, known, and large enough."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.rollout.shapes import NARROWEST, least_holding, row_counts, slots, widths


@given(limit=st.integers(1, 40_000))
def test_the_cache_doubles_up_to_what_is_needed(limit: int) -> None:
    found = widths(limit)
    assert found[-1] == slots(limit - 1)
    assert list(found) == sorted(set(found))
    assert all(b <= 2 * a for a, b in zip(found, found[1:], strict=False))
    assert len(found) == 1 or found[0] == NARROWEST
    assert len(found) <= 1 + max(0, math.ceil(math.log2(slots(limit) / NARROWEST)))


@given(
    rows=st.integers(1, 2_000),
    steps=st.integers(0, 8),
    ways=st.sampled_from([1, 2, 8]),
    data=st.data(),
)
def test_a_batch_holds_its_rows_and_little_more(
    rows: int, steps: int, ways: int, data: st.DataObject
) -> None:
    counts = row_counts(rows, steps=steps, ways=ways)
    assert counts[0] == rows
    assert list(counts) == sorted(set(counts), reverse=True)
    assert all(count % ways == 0 for count in counts[1:])
    assert len(counts) <= 1 + steps * math.ceil(math.log2(max(rows, 2)))
    active = data.draw(st.integers(0, rows))
    held = least_holding(counts, active)
    assert held >= active
    if steps and active:
        # The next count above, rounded up to whole rows and to what the devices share.
        assert held <= max(math.ceil(active * 2 ** (1 / steps)), 1) + ways


def test_without_steps_a_batch_keeps_its_size() -> None:
    assert row_counts(64, steps=0) == (64,)
    assert row_counts(64, steps=1) == (64, 32, 16, 8, 4, 2, 1)
    assert row_counts(64, steps=1, ways=8) == (64, 32, 16, 8)


def test_what_holds_nothing_is_an_error() -> None:
    with pytest.raises(ValueError):
        least_holding((4, 2), 5)
