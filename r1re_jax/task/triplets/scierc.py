"""Documents of SciERC's form (Luan et al., 2018, arXiv 1808.09602; DyGIE++ reads it too).

    {"doc_key": …, "sentences": [[token]], "ner": [[[first, last, type]]],
     "relations": [[[first, last, first, last, relation]]]}

`ner` and `relations` have a list for each sentence. Tokens are numbered over the whole document and
both ends of a span belong to it.
"""

from collections.abc import Sequence
from typing import Any

from r1re_jax.task.rows import kind_of, value
from r1re_jax.task.schema import DataError
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample

SENTENCES = "sentences"
"""The key by which a document is known."""


def document_examples(row: dict[str, Any]) -> list[TripletExample]:
    """The sentences of a document, each an example `doc_key-number`: its tokens joined by blanks.

    Raises:
      DataError: a span that leaves its sentence, a relation of no entity, or a list of another
        form; names the sentence.
    """
    name = value(row, "doc_key", str)
    sentences, ner, relations = (value(row, key, list) for key in (SENTENCES, "ner", "relations"))
    for key, rows in (("ner", ner), ("relations", relations)):
        if len(rows) != len(sentences):
            raise DataError(
                f"{key!r} has {len(rows)} lists for {len(sentences)} sentences; expected one each"
            )
    examples, first = [], 0
    for number, lists in enumerate(zip(sentences, ner, relations, strict=True)):
        try:
            examples.append(_example(f"{name}-{number}", *lists, first=first))
        except DataError as error:
            raise DataError(f"sentence {number}: {error}") from None
        first += len(lists[0])
    return examples


def _example(id: str, tokens: Any, ner: Any, relations: Any, *, first: int) -> TripletExample:
    """The example of a sentence whose first token has number `first` in the document."""
    tokens = _items(tokens, "tokens", str)
    entities, place_of = [], {}
    for *span, type in _rows(ner, "ner", "[first, last, type]", (int, int, str)):
        # Two types of one span are two entities; a relation is of the words, so of either.
        place_of.setdefault(tuple(span), len(entities))
        entities.append(Entity(*_words(tokens, span, first), type))
    triplets = []
    form = "[first, last, first, last, relation]"
    for *spans, label in _rows(relations, "relations", form, (int, int, int, int, str)):
        ends = tuple(spans[:2]), tuple(spans[2:])
        for end in ends:
            if end not in place_of:
                raise DataError(f"a relation {label!r} of {list(end)}, which is no span of 'ner'")
        triplets.append(Triplet(*(place_of[end] for end in ends), label))
    return TripletExample(id, " ".join(tokens), tuple(entities), tuple(triplets))


def _words(tokens: Sequence[str], span: Sequence[int], first: int) -> tuple[str, int, int]:
    """Text, start and end of a span of token numbers."""
    begin, last = (number - first for number in span)
    if not 0 <= begin <= last < len(tokens):
        raise DataError(
            f"the span {list(span)} leaves its sentence, tokens {first} to "
            f"{first + len(tokens) - 1}"
        )
    start = len(" ".join(tokens[:begin])) + (begin > 0)
    text = " ".join(tokens[begin : last + 1])
    return text, start, start + len(text)


def _rows(found: Any, key: str, form: str, kinds: Sequence[type]) -> list[list[Any]]:
    """The entries of a list, each a list of values of the given kinds."""
    rows = _items(found, key, list)
    for row in rows:
        fits = len(row) == len(kinds) and all(map(_is, row, kinds))
        if not fits:
            raise DataError(f"{key!r} must hold {form}, found {str(row)[:60]}")
    return rows


def _items(found: Any, key: str, kind: type) -> list[Any]:
    """A list of values of one kind."""
    if not isinstance(found, list):
        raise DataError(f"{key!r} must be a list, found {kind_of(found)}")
    for one in found:
        if not _is(one, kind):
            raise DataError(f"{key!r} must be a list of {kind.__name__}, found {kind_of(one)}")
    return found


def _is(found: Any, kind: type) -> bool:
    return isinstance(found, kind) and not isinstance(found, bool)
