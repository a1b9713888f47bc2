"""The completion that a supervised warm start of triplet extraction teaches."""

import json

from r1re_jax.task.completions import TAUGHT, Taught, completion
from r1re_jax.task.relations import RESERVED_TAGS
from r1re_jax.task.triplets.examples import Triplet, TripletExample

NOTHING = "No relation of the guide."


def triplet_completion(example: TripletExample, *, taught: Taught = TAUGHT) -> str:
    """Thoughts and the right answer.

    Args:
      example: with its own reasoning, or `plain_triplet_reasoning` where it has none.
      taught: what its thoughts are.

    Returns:
      `<think>…</think><answer>{"entities": …, "triplets": …}</answer>`.

    Raises:
      DataError: reasoning that is blank or holds a tag.
    """
    make = lambda: plain_triplet_reasoning(  # noqa: E731
        example, between_words=taught.between_words
    )
    return completion(
        answer_text(example), id=example.id, reasoning=example.reasoning, make=make, taught=taught
    )


def answer_text(example: TripletExample) -> str:
    """The right answer as JSON; a tag in the sentence is escaped, so that it ends nothing."""
    text = json.dumps(example.answer, ensure_ascii=False)
    if any(tag in text for tag in RESERVED_TAGS):
        text = text.replace("<", "\\u003c")
    return text


def plain_triplet_reasoning(
    example: TripletExample, *, between_words: int = TAUGHT.between_words
) -> str:
    """A short thought where none is given: of each triplet the words between, and the guide's line.

    Args:
      example: with its triplets.
      between_words: at most so many words are quoted of each.
    """
    thoughts = [_thought(example, triplet, between_words) for triplet in example.triplets]
    thought = "\n".join(thoughts or [NOTHING])
    return thought.replace("<", "") if any(tag in thought for tag in RESERVED_TAGS) else thought


def _thought(example: TripletExample, triplet: Triplet, between_words: int) -> str:
    ends = example.entities[triplet.head], example.entities[triplet.tail]
    first, second = sorted(ends, key=lambda entity: (entity.start, entity.end))
    words = example.text[first.end : second.start].split()
    middle = " ".join(words[:between_words]) + (" ..." if len(words) > between_words else "")
    return f"Cue: {middle or 'nothing between'}\n- **{triplet.label}**"
