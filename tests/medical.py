"""Finds words of miniworld's medical domain, which is held out, in texts."""

import functools
import re
from collections.abc import Iterable

from r1re_jax.task.miniworld import domains, words

TELLING = 6  # a cue's words of fewer letters ("to", "under") tell nothing alone


@functools.cache
def medical_cues() -> frozenset[str]:
    """The cues and, of each, the words that no other domain needs."""
    cues = {cue.words for relation in domains.medical().relations for cue in relation.cues}
    return frozenset(cues | {word for cue in cues for word in cue.split() if len(word) >= TELLING})


@functools.cache
def medical_names() -> frozenset[str]:
    """The names of the relations."""
    return frozenset(relation.name for relation in domains.medical().relations)


def medical_words_in(texts: Iterable[str]) -> set[str]:
    """Every name, cue, cue's word and noun of the medical domain that stands in one of the texts.

    Raises:
        AssertionError: no text to search.
    """
    text = "\n".join(texts).lower()
    assert text
    held_out = medical_cues() | medical_names() | set(words.MEDICAL_NOUNS)
    return {
        *(held_out & set(re.findall(r"\w+", text))),
        *(cue for cue in held_out if " " in cue and cue in text),
    }
