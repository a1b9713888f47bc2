"""The completion that a supervised warm start of pair classification teaches."""

import re

from r1re_jax.task.relations import RESERVED_TAGS, DataError, Example
from r1re_jax.task.rewards import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

NO_REASONING = "-"
BETWEEN_WORDS = 12


def sft_completion(
    example: Example, *, reasoning: bool = True, between_words: int = BETWEEN_WORDS
) -> str:
    """The completion that a supervised warm start teaches.

    Args:
      example: an example with a label.
      reasoning: the example's own reasoning, or `plain_reasoning` where it has none; False teaches
        the bare format, with a dash for a thought (blank thoughts are malformed).
      between_words: of `plain_reasoning`.

    Returns:
      `<think>…</think><answer>label</answer>`.

    Raises:
      DataError: an example without label, or whose reasoning is blank or holds a tag.
    """
    if not example.label:
        raise DataError(f"example {example.id} has no label; a completion to learn from needs one")
    thoughts = NO_REASONING
    if reasoning:
        thoughts = (
            plain_reasoning(example, between_words=between_words)
            if example.reasoning is None
            else example.reasoning.strip()
        )
    if not thoughts or any(tag in thoughts for tag in RESERVED_TAGS):
        raise DataError(
            f"the reasoning of example {example.id} must neither be blank nor hold "
            f"{' '.join(RESERVED_TAGS)}, found {thoughts!r}"
        )
    return f"{THINK_OPEN}{thoughts}{THINK_CLOSE}{ANSWER_OPEN}{example.label}{ANSWER_CLOSE}"


def plain_reasoning(example: Example, *, between_words: int = BETWEEN_WORDS) -> str:
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
