"""The batch as a regular forest: N guides, P questions under each, then G completions each.

A level holds right-padded token rows and their true lengths. What lies behind a row's length is
padding: it is computed (shapes are static) but nothing else ever attends to it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np


class LimitError(ValueError):
    """A row is longer than the level's limit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """Right-padded rows of one level of the tree.

    Attributes:
        tokens: [*B, T] int32.
        length: [*B] int32, true tokens of each row, 0 … T.
    """

    tokens: jax.Array | np.ndarray
    length: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """N trees of one guide, P questions and P·G completions each.

    Attributes:
        guide: tokens [N, S], length [N].
        question: tokens [N, P, Q], length [N, P]; every question has at least one token, since its
            last one predicts the completion's first.
        completion: tokens [N, P, G, C], length [N, P, G].
    """

    guide: Level
    question: Level
    completion: Level


def pad_level(
    rows: Sequence,
    *,
    limit: int,
    pad_id: int,
    name: str = "row",
    names: Sequence[str] | None = None,
) -> Level:
    """Pad (nested) lists of token ids on the right to `limit`.

    Args:
        rows: nested sequences [*B][tokens] of equal nesting; the innermost are lists of int.
        limit: T, width of the level. Nothing is ever cut.
        pad_id: token id written into the padding (never attended to).
        name: what a row is called in the error.
        names: one name per flattened row, for the error.

    Returns:
        Level of NumPy arrays: tokens [*B, limit] int32, length [*B] int32.

    Raises:
        LimitError: some rows are longer; the message counts them and names the longest.
        ValueError: groups of unequal sizes.
    """
    batch = _batch_shape(rows)
    flat = _flatten(rows, batch)
    lengths = np.array([len(row) for row in flat], np.int32)
    over = int((lengths > limit).sum())
    if over:
        longest = int(lengths.argmax())
        which = f" ({names[longest]})" if names is not None else ""
        raise LimitError(
            f"{over} of {len(flat)} {name}s are longer than the limit of {limit} tokens; the"
            f" longest{which} has {lengths[longest]}. Raise limits.{name} to {lengths[longest]} or"
            " drop the examples: nothing is cut."
        )
    tokens = np.full((len(flat), limit), pad_id, np.int32)
    for i, row in enumerate(flat):
        tokens[i, : len(row)] = row
    return Level(tokens.reshape(*batch, limit), lengths.reshape(batch))


def _batch_shape(rows: Sequence) -> tuple[int, ...]:
    """Shape [*B] of nested sequences whose innermost lists hold integers (or are empty)."""
    if not len(rows) or isinstance(rows[0], int | np.integer):
        return ()
    return (len(rows), *_batch_shape(rows[0]))


def _flatten(rows: Sequence, batch: tuple[int, ...]) -> list[Sequence[int]]:
    """List the innermost sequences; every group must have the size that `batch` gives it."""
    if not batch:
        return [rows]
    if len(rows) != batch[0]:
        raise ValueError(
            f"a group has {len(rows)} rows where the first has {batch[0]}: all groups of a level"
            " must have as many"
        )
    return [leaf for row in rows for leaf in _flatten(row, batch[1:])]
