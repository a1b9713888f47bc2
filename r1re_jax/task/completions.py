"""The completion that a supervised warm start teaches: thoughts, and the right answer."""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

from r1re_jax.task.relations import RESERVED_TAGS, DataError, Example
from r1re_jax.task.rewards import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

NO_REASONING = "-"


class Thoughts(enum.StrEnum):
    """What stands for thoughts in a completion to learn."""

    GIVEN = "given"  # the example's own reasoning, or a made-up one where it has none
    NONE = "none"  # a dash, since blank thoughts are malformed: the answer alone is taught


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a completion to learn holds beside the answer.

    Attributes:
      thoughts: which.
      between_words: a made-up thought quotes at most so many of the words between two mentions.
    """

    thoughts: Thoughts = Thoughts.GIVEN
    between_words: int = 12


TAUGHT = Taught()


def sft_completion(example: Example, *, taught: Taught = TAUGHT) -> str:
    """The completion of a marked pair.

    Args:
      example: an example with a label.
      taught: what its thoughts are; made up by `plain_reasoning`.

    Returns:
      `<think>…</think><answer>label</answer>`.

    Raises:
      DataError: an example without label, or whose reasoning is blank or holds a tag.
    """
    if not example.label:
        raise DataError(f"example {example.id} has no label; a completion to learn from needs one")
    make = lambda: plain_reasoning(example, between_words=taught.between_words)  # noqa: E731
    return completion(
        example.label, id=example.id, reasoning=example.reasoning, make=make, taught=taught
    )


def completion(
    answer: str, *, id: str, reasoning: str | None, make: Callable[[], str], taught: Taught
) -> str:
    """Thoughts and an answer, whatever the task.

    Args:
      answer: what stands between the answer tags.
      id: of the example, for messages.
      reasoning: the example's own; None where it has none.
      make: makes up a thought.
      taught: which of them is used.

    Raises:
      DataError: thoughts that are blank or hold a tag.
    """
    thoughts = NO_REASONING
    if taught.thoughts is Thoughts.GIVEN:
        thoughts = make() if reasoning is None else reasoning.strip()
    if not thoughts or any(tag in thoughts for tag in RESERVED_TAGS):
        raise DataError(
            f"the reasoning of example {id} must neither be blank nor hold "
            f"{' '.join(RESERVED_TAGS)}, found {thoughts!r}"
        )
    return f"{THINK_OPEN}{thoughts}{THINK_CLOSE}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def plain_reasoning(example: Example, *, between_words: int = TAUGHT.between_words) -> str:
    """A short thought where none is given: the words between the mentions, and the label's line.

    Args:
      example: an example with a label.
      between_words: at most so many words are quoted.
    """
    words = example.between.split()
    middle = " ".join(words[:between_words]) + (" ..." if len(words) > between_words else "")
    name = example.label.partition("(")[0]
    thought = f"Cue: {middle or 'nothing between'}\n- **{name}**"
    return re.sub("|".join(map(re.escape, RESERVED_TAGS)), "", thought)
