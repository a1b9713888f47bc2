"""What the sections of a config have in common."""

import dataclasses
import enum
from typing import Any

FLAT = "flat"


class Dtype(enum.StrEnum):
    """Numbers that can be asked for."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def flat(default: Any) -> Any:
    """Make a dataclass field whose keys stand in the config beside those of its section."""
    return dataclasses.field(default=default, metadata={FLAT: True})


def check_batch(trees: int, questions: int, micro_batch: int) -> None:
    """Refuse micro-batches that do not tile the [trees, questions] of a step."""
    if micro_batch < questions:
        fits = micro_batch == 0 or questions % micro_batch == 0
    else:
        fits = micro_batch % questions == 0 and trees * questions % micro_batch == 0
    if not fits:
        raise ValueError(
            f"micro_batch is {micro_batch} questions; a step has {trees} trees of {questions}, so"
            f" it must divide {questions}, or be a multiple of {questions} that divides"
            f" {trees * questions}"
        )
