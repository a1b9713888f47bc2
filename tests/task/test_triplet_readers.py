"""Sentences with triplets from files: our own lines and SciERC's, every fault by its line."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from r1re_jax.task.relations import EntityType, Relation, TripletSchema
from r1re_jax.task.schema import DataError
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample
from r1re_jax.task.triplets.readers import read_triplets, write_triplets

SCHEMA = TripletSchema(
    (EntityType("Method"), EntityType("Task")),
    (Relation("USED-FOR"), Relation("COMPARE", directed=False)),
)
ROW = {
    "id": "a",
    "text": "CRF helps NER.",
    "entities": [
        {"text": "CRF", "start": 0, "end": 3, "type": "Method"},
        {"text": "NER", "start": 10, "end": 13, "type": "Task"},
    ],
    "triplets": [{"head": 0, "tail": 1, "label": "USED-FOR"}],
}
EXAMPLE = TripletExample(
    "a",
    "CRF helps NER.",
    (Entity("CRF", 0, 3, "Method"), Entity("NER", 10, 13, "Task")),
    (Triplet(0, 1, "USED-FOR"),),
)
DOCUMENT = {
    "doc_key": "D",
    "sentences": [
        ["A", "CRF", "model", "helps", "NER", "."],
        ["Fine", "."],
        ["CRF", "beats", "it"],
    ],
    "ner": [[[1, 2, "Method"], [4, 4, "Task"]], [], [[8, 8, "Method"], [10, 10, "Method"]]],
    "relations": [[[1, 2, 4, 4, "USED-FOR"]], [], [[10, 10, 8, 8, "COMPARE"]]],
    "clusters": [],
}


def _write(path: pathlib.Path, *rows: Any) -> pathlib.Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_row_becomes_an_example(tmp_path: pathlib.Path) -> None:
    more = {"split": "train", "domain": "d", "reasoning": "so", "extra": [1]}
    path = _write(tmp_path / "x.jsonl", ROW, ROW | more | {"id": "b"})
    second = dataclasses.replace(EXAMPLE, id="b", split="train", domain="d", reasoning="so")
    assert read_triplets(path, schema=SCHEMA) == [EXAMPLE, second]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_writing_and_reading_are_inverse(tmp_path: pathlib.Path, name: str) -> None:
    empty = TripletExample("ü", "Nichts.", split="s", domain="d", reasoning="r\n")
    write_triplets(tmp_path / name, [EXAMPLE, empty])
    assert read_triplets(tmp_path / name, schema=SCHEMA) == [EXAMPLE, empty]


def test_a_document_becomes_an_example_of_each_sentence(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path / "x.jsonl", DOCUMENT, ROW)
    first, second, third, own = read_triplets(path, schema=SCHEMA)
    assert first == TripletExample(
        "D-0",
        "A CRF model helps NER .",
        (Entity("CRF model", 2, 11, "Method"), Entity("NER", 18, 21, "Task")),
        (Triplet(0, 1, "USED-FOR"),),
    )
    assert second == TripletExample("D-1", "Fine .")
    assert third.triplets == (Triplet(1, 0, "COMPARE"),)
    assert [entity.text for entity in third.entities] == ["CRF", "it"]
    assert own == EXAMPLE


def test_a_span_may_have_two_types(tmp_path: pathlib.Path) -> None:
    row = DOCUMENT | {
        "ner": [[[1, 2, "Method"], [1, 2, "Task"], [4, 4, "Task"]], [], DOCUMENT["ner"][2]]
    }
    example = read_triplets(_write(tmp_path / "x.jsonl", row), schema=SCHEMA)[0]
    assert [entity.type for entity in example.entities] == ["Method", "Task", "Task"]
    assert example.triplets == (Triplet(0, 2, "USED-FOR"),)


def _entities(*rows: Any) -> dict[str, Any]:
    return ROW | {"entities": list(rows), "triplets": []}


def _triplets(*rows: Any) -> dict[str, Any]:
    return ROW | {"triplets": list(rows)}


def _document(**lists: list[Any]) -> dict[str, Any]:
    """The document with other lists of its first sentence, and no entities in the others."""
    alone = {"ner": DOCUMENT["ner"][0], "relations": DOCUMENT["relations"][0]} | lists
    rows = {key: [found, [], []] for key, found in alone.items()}
    return DOCUMENT | {"sentences": [DOCUMENT["sentences"][0], ["a"], ["b"]]} | rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ({}, "the key 'id' is missing; found no key"),
        (ROW | {"id": ""}, "'id' must not be empty"),
        (ROW | {"text": " "}, "the text is blank"),
        (ROW | {"entities": {}}, "'entities' must be a list, found an object"),
        (_entities("CRF"), r"'entities\[0\]' must be an object, found a string"),
        (_entities({"text": "CRF", "start": 0, "end": 3}), r"key 'entities\[0\].type' is missing"),
        (
            _entities(ROW["entities"][0] | {"end": 3.0}),
            r"'entities\[0\].end' must be an integer, found a number",
        ),
        (_entities(ROW["entities"][0] | {"start": 1}), r"entity 0 is 'CRF' but text\[1:3\] is 'R"),
        (_entities(ROW["entities"][0] | {"end": 99}), r"entity 0 \[0, 99\) is no span"),
        (_entities(ROW["entities"][0] | {"type": "Tsk"}), "no entity type 'Tsk'; did you mean 'Ta"),
        (_triplets(7), r"'triplets\[0\]' must be an object, found an integer"),
        (_triplets({"head": 0, "tail": 1}), r"the key 'triplets\[0\].label' is missing"),
        (_triplets({"head": True, "tail": 1, "label": "COMPARE"}), "must be an integer, found a b"),
        (_triplets({"head": 0, "tail": 2, "label": "COMPARE"}), "tail of triplet 0 is entity 2"),
        (_triplets({"head": 0, "tail": 1, "label": "USED"}), "no relation 'USED'; did you mean 'U"),
        (ROW | {"id": "first"}, "id 'first' is that of line 1 too"),
        ({"sentences": []}, "the key 'doc_key' is missing"),
        (DOCUMENT | {"ner": None}, "'ner' must be a list, found null"),
        (DOCUMENT | {"ner": [[]]}, "'ner' has 1 lists for 3 sentences"),
        (DOCUMENT | {"sentences": ["A b", [], []]}, "sentence 0: 'tokens' must be a list, found a"),
        (DOCUMENT | {"sentences": [["A", 1], [], []]}, "sentence 0: 'tokens' must be a list of s"),
        (_document(sentences=["A"] * 6), "sentence 1: the text is blank"),
        (_document(ner=[[1, "Method"]]), r"sentence 0: 'ner' must hold \[first, last, type\]"),
        (_document(ner=["x"]), "sentence 0: 'ner' must be a list of list, found a string"),
        (_document(ner=[[5, 6, "Method"]]), r"sentence 0: the span \[5, 6\] leaves .* 0 to 5"),
        (_document(ner=[[2, 1, "Method"]]), r"sentence 0: the span \[2, 1\] leaves"),
        (
            _document(ner=[[1, 2, "Mthod"], [4, 4, "Task"]], relations=[]),
            "example D-0: the guide has no entity type 'Mthod'",
        ),
        (_document(relations=[[1, 1, 4, 4, "USED-FOR"]]), r"'USED-FOR' of \[1, 1\], which is no"),
        (_document(relations=[[1, 2, 4, 4, "USE-FOR"]]), "D-0: .* no relation 'USE-FOR'; did"),
        (_document(relations=[[1, 2, 4, 4]]), r"'relations' must hold \[first, last, first, last"),
    ],
)  # fmt: skip
def test_bad_lines_are_refused_by_file_and_line(
    tmp_path: pathlib.Path, row: Any, message: str
) -> None:
    path = _write(tmp_path / "x.jsonl", ROW | {"id": "first"}, row)
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*" + message):
        read_triplets(path, schema=SCHEMA)


def test_an_empty_and_a_missing_file_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="the file is empty"):
        read_triplets(_write(tmp_path / "x.jsonl"), schema=SCHEMA)
    with pytest.raises(DataError, match="no data file"):
        read_triplets(tmp_path / "y.jsonl", schema=SCHEMA)
