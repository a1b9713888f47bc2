"""Guides that name entity types, and sentences with their entities and triplets."""

import dataclasses
from typing import Any

import pytest

from r1re_jax.task.relations import (
    EntityType,
    GuideError,
    Relation,
    Schema,
    TripletSchema,
    make_guide,
    parse_guide,
)
from r1re_jax.task.schema import DataError
from r1re_jax.task.triplets.examples import Entity, Extraction, Triplet
from tests.task.papers import EXAMPLE, GUIDE, RIGHT, SCHEMA, TEXT, answer_of, guide

# --- guides ---------------------------------------------------------------------------------------


def test_a_guide_with_types_serves_both_tasks() -> None:
    both = guide()
    plain = parse_guide("# Papers\n\n## Relations" + GUIDE.split("## Relations")[1])
    assert both.schema == plain.schema
    assert plain.entities == ()
    assert both.entities == SCHEMA.entities
    assert SCHEMA.types == ("Method", "Task")
    assert SCHEMA.names == ("Used-For", "Near")
    assert SCHEMA.directionless == {"Near"}
    assert SCHEMA.entities[0] == EntityType("Method", "a way to do something.")
    with pytest.raises(GuideError, match="'Papers' names no entity types.*'## Entities' before"):
        _ = plain.triplets


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- **Method**: a way", "**Method**: a way", r"g\.md:5: cannot read '\*\*Method"),
        ("- **Method**: a way to do something.", "- **Method**:", r"g\.md:5: cannot read"),
        ("- **Method**", "- ** **", r"g\.md:5: cannot read"),
        ("- **Method**", "- **Method(X = a, Y = b)**", r"g\.md:5: cannot read"),
        ("- **Method**", "- **<think>**", r"g\.md:5: bad name '<think>'"),
        ("- **Task**", "- **Method**", r"g\.md:6: 'Method' is defined twice"),
        ("## Entities", "## Types", r"g\.md:3: expected '## Relations' or '## Rules', found "
         r"'## Types' \('## Entities' may come first\)"),
        ("## Rules", "## Entities", r"g\.md:14: expected '## Rules', found '## Entities'"),
        (
            "- **Method**: a way to do something.\n- **Task**: what is to be done.\n",
            "",
            r"g\.md: no entity types under '## Entities'",
        ),
    ],
)  # fmt: skip
def test_errors_of_types_name_the_line(old: str, new: str, message: str) -> None:
    assert old in GUIDE
    with pytest.raises(GuideError, match=message):
        parse_guide(GUIDE.replace(old, new, 1), source="g.md")


def test_a_written_guide_is_read_back() -> None:
    types = (EntityType("A", "a thing."), EntityType("B", "another."))
    made = make_guide("T", Schema((Relation("R", "x", "y", True, "d"),)), entities=types)
    assert parse_guide(made.text) == made
    assert made.triplets == TripletSchema(types, made.schema.relations)
    with pytest.raises(GuideError, match="plain single lines"):
        make_guide("T", made.schema, entities=(EntityType("A", " a"),))


def test_schemas_need_distinct_names() -> None:
    relation = Relation("R")
    with pytest.raises(GuideError, match="at least one entity type, found none"):
        TripletSchema((), (relation,))
    with pytest.raises(GuideError, match="at least one relation, found none"):
        TripletSchema((EntityType("A"),), ())
    with pytest.raises(GuideError, match="found more than one entity type A"):
        TripletSchema((EntityType("A"), EntityType("A")), (relation,))
    with pytest.raises(DataError, match="no entity type 'Methd'; did you mean 'Method'"):
        SCHEMA.check_type("Methd")
    with pytest.raises(DataError, match="no relation 'Used'; did you mean 'Used-For'"):
        SCHEMA.check_relation("Used")


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "the text is blank"),
        ({"text": "CRF helps it, as HMM does."}, r"entity 1 is 'NER' but text\[10:13\] is 'it,'"),
        ({"entities": EXAMPLE.entities[:1]}, "tail of triplet 0 is entity 1; .* 1 entities"),
        ({"triplets": (Triplet(-1, 0, "Near"),)}, "head of triplet 0 is entity -1"),
        ({"entities": (Entity("", 3, 3, "Task"),), "triplets": ()}, r"entity 0 \[3, 3\) is no"),
    ],
)
def test_bad_examples_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(EXAMPLE, **change)


def test_an_example_shows_its_sentence_and_itsanswer() -> None:
    assert EXAMPLE.question == TEXT
    assert EXAMPLE.answer == RIGHT
    assert Extraction.from_json(RIGHT) == EXAMPLE.extraction
    other = dataclasses.replace(EXAMPLE, id="p2", triplets=EXAMPLE.triplets[::-1])
    assert other.gold == EXAMPLE.gold != dataclasses.replace(EXAMPLE, triplets=()).gold


def test_what_is_said_twice_is_said_once() -> None:
    twice = answer_of([["CRF", "Method"]] * 2, [["CRF", "Near", "HMM"]] * 2)
    assert Extraction.from_json(twice).to_json() == answer_of(
        [["CRF", "Method"]], [["CRF", "Near", "HMM"]]
    )
