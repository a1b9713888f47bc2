"""Precision, recall and F1 of extractions by loops over plain dicts, apart from the library."""

from typing import Any

Answer = dict[str, list[dict[str, str]]]


def _pop_equal(things: list[Any], thing: Any) -> bool:
    if thing in things:
        things.remove(thing)
        return True
    return False


def _distinct(things: list[Any]) -> list[Any]:
    kept = []
    for thing in things:
        if thing not in kept:
            kept.append(thing)
    return kept


def _same_way(triplet: dict[str, str], directionless: set[str]) -> list[Any]:
    head, tail = triplet["head"], triplet["tail"]
    if triplet["relation"] in directionless and tail < head:
        head, tail = tail, head
    return [head, triplet["relation"], tail]


def things(answer: Answer | None, kind: str, directionless: set[str]) -> list[Any]:
    """What an answer says of one kind, each thing once; nothing if there is no answer."""
    if answer is None:
        return []
    if kind == "entities":
        return _distinct([[one["text"], one["type"]] for one in answer["entities"]])
    plain = _distinct([_same_way(one, directionless) for one in answer["triplets"]])
    if kind == "triplets":
        return plain
    typed = []
    for head, relation, tail in plain:
        listed = [
            sorted({one["type"] for one in answer["entities"] if one["text"] == end})
            for end in (head, tail)
        ]
        typed.append([head, relation, tail, listed])
    return typed


def counts(gold: Answer, answer: Answer | None, kind: str, directionless: set[str]) -> list[int]:
    """Right, said, wanted."""
    wanted, said = things(gold, kind, directionless), things(answer, kind, directionless)
    left = list(wanted)
    return [sum(_pop_equal(left, thing) for thing in said), len(said), len(wanted)]


def figures(pairs: list[tuple[Answer, Answer | None]], kind: str, directionless: set[str]) -> dict:
    """Micro precision, recall and F1 in [0, 100] over pairs of gold and answer."""
    right = said = wanted = 0
    for gold, answer in pairs:
        one = counts(gold, answer, kind, directionless)
        right, said, wanted = right + one[0], said + one[1], wanted + one[2]
    precision = right / said if said else 0.0
    recall = right / wanted if wanted else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "n": wanted}
