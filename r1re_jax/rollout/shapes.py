"""Which shapes a rollout's batch can have: few, and known before it begins.

While completions are drawn, finished rows are dropped and the cache of what has been written grows.
Each shape of the batch is a program of its own, so both go by steps.
"""

import math

# Slots of the smallest cache; then it doubles.
NARROWEST = 64
# Tokens that are written to the cache at a time.
RECENT = 8


def widths(limit: int, *, smallest: int = 0) -> tuple[int, ...]:
    """Return the widths that the cache of completions can have, in slots, rising.

    Args:
        limit: C, most tokens of a completion; its last token is never looked at.
        smallest: the first width, whole blocks of it; 0 for NARROWEST.
    """
    whole, first = slots(limit - 1), slots(smallest or NARROWEST)
    doublings = range(max(0, math.ceil(math.log2(whole / first))))
    return (*(first << doubling for doubling in doublings), whole)


def slots(tokens: int) -> int:
    """Return the slots that so many tokens need: whole blocks, one at least."""
    return -(-max(tokens, 1) // RECENT) * RECENT


def row_counts(rows: int, *, steps: int, ways: int = 1, smallest: int = 1) -> tuple[int, ...]:
    """Return the numbers of rows of a tree that a batch can have, falling from `rows` on.

    Args:
        rows: P·G at the beginning.
        steps: how many numbers from one to its half; 0 keeps the first for good.
        ways: devices that share the rows: every number but the first is a multiple.
        smallest: fewer rows are not worth a program of their own.
    """
    found = [rows]
    for step in range(1, steps * math.ceil(math.log2(max(rows, 1))) + 1) if steps else ():
        count = -(-math.ceil(rows * 2 ** (-step / steps)) // ways) * ways
        if smallest <= count < found[-1]:
            found.append(count)
    return tuple(found)


def least_holding(sizes: tuple[int, ...], needed: int) -> int:
    """Return the smallest of some sizes that is at least `needed`."""
    return min(size for size in sizes if size >= needed)
