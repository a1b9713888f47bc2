"""Labels: canonical forms, directionless labels, and what is refused."""

import pytest

from r1re_jax.task.schema import DataError, GuideError, Relation, Schema

SCHEMA = Schema((Relation("Cause-Effect"), Relation("merged_with", directed=False)), "Other")


def test_labels_are_canonical_and_in_the_order_of_the_guide() -> None:
    assert SCHEMA.labels == ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "merged_with", "Other")
    assert SCHEMA.directionless == {"merged_with", "Other"}
    assert Schema((Relation("R"),)).labels == ("R(e1,e2)", "R(e2,e1)")
    assert Schema((Relation("R"),)).directionless == frozenset()


def test_relation_of_takes_every_label_and_no_other() -> None:
    assert [SCHEMA.relation_of(label) for label in SCHEMA.labels] == [
        "Cause-Effect",
        "Cause-Effect",
        "merged_with",
        "Other",
    ]
    with pytest.raises(DataError, match=r"no label 'Cause-Efect\(e1,e2\)'; did you mean 'Cause-"):
        SCHEMA.relation_of("Cause-Efect(e1,e2)")
    assert "Other" in SCHEMA
    assert "Cause-Effect" not in SCHEMA
    assert None not in SCHEMA


def test_an_unlike_label_gets_no_hint_but_the_list() -> None:
    with pytest.raises(DataError, match="has no label 'zzz' Its labels are: Cause-Effect") as error:
        SCHEMA.check_label("zzz")
    assert "did you mean" not in str(error.value)


def test_equal_schemas_are_equal_and_hash_alike() -> None:
    again = Schema((Relation("Cause-Effect"), Relation("merged_with", directed=False)), "Other")
    assert again == SCHEMA
    assert hash(again) == hash(SCHEMA)
    assert again.labels  # cached, and still equal
    assert again == SCHEMA


@pytest.mark.parametrize(
    "name", ["", " R", "R ", "R(e1)", "a\nb", "a\rb", "x</answer>", "<think>", "a)"]
)
def test_names_that_no_answer_can_give_are_refused(name: str) -> None:
    with pytest.raises(GuideError, match="bad name"):
        Relation(name)
    with pytest.raises(GuideError, match="bad name"):
        Schema((Relation("R"),), name)


def test_schemas_need_relations_of_different_names() -> None:
    with pytest.raises(GuideError, match="at least one relation"):
        Schema((), "Other")
    with pytest.raises(GuideError, match="more than once: R"):
        Schema((Relation("R"), Relation("S"), Relation("R")))
    with pytest.raises(GuideError, match="more than once: R"):
        Schema((Relation("R"),), "R")
