"""Examples and guides: what is read, what comes back, and what is refused with its line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.task.relations import (
    DataError,
    Example,
    Guide,
    GuideError,
    Mention,
    Relation,
    Schema,
    load_guide,
    make_guide,
    parse_guide,
    parse_tagged,
)

GUIDE = """# Small

## Relations

- **Cause-Effect(X = cause, Y = effect)**: X brings Y about (often: directly).
- **merged_with(X = company, Y = company)** [no direction]: X and Y are one now.
- **Other**: none of them.

## Rules

1. Read.
2. Think
   twice.
- Then answer.
"""

CAT = Example("1", "The cat sat here.", Mention("cat", 4, 7), Mention("here", 12, 16), "R(e1,e2)")


def test_a_guide_gives_title_schema_and_rules() -> None:
    guide = parse_guide(GUIDE)
    assert guide.title == "Small"
    assert guide.schema == Schema(
        (
            Relation(
                "Cause-Effect", "cause", "effect", True, "X brings Y about (often: directly)."
            ),
            Relation("merged_with", "company", "company", False, "X and Y are one now."),
        ),
        "Other",
    )
    assert guide.rules == ("Read.", "Think twice.", "Then answer.")
    assert guide.text == GUIDE
    assert guide.sha256 == parse_guide(GUIDE).sha256 != parse_guide(GUIDE + "\n").sha256


def test_a_guide_needs_neither_rules_nor_a_none_label() -> None:
    guide = parse_guide("# T\n## Relations\n- **R(X=a,Y=b)**[no direction]:d")
    assert guide.schema == Schema((Relation("R", "a", "b", False, "d"),))
    assert guide.rules == ()


def test_rules_may_be_plain_lines() -> None:
    assert parse_guide(GUIDE.replace("1. Read.", "Read.")).rules[0] == "Read."


@pytest.mark.parametrize("corpus", ["core", "drugprot", "semeval2010"])
def test_guides_of_the_corpora_give_their_schemas(shared: Path, corpus: str) -> None:
    guide = load_guide(shared / "data" / corpus / "guideline.md")
    truth = json.loads((shared / "data" / corpus / "relations.json").read_text())
    relations = tuple(
        Relation(row["name"], row["arg1"], row["arg2"], row["directed"], row["definition"])
        for row in truth["labels"]
    )
    assert guide.schema == Schema(relations, truth["none"])
    assert guide.rules == tuple(truth["rules"])


def test_line_ends_of_windows_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "guide.md"
    path.write_bytes(b"\xef\xbb\xbf" + GUIDE.replace("\n", "\r\n").encode())
    assert load_guide(path) == parse_guide(GUIDE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# Small\n", "", r"g\.md:2: the title is missing"),
        ("# Small", "Small", r"g\.md:1: the title is missing"),
        ("# Small", "## Relations", r"g\.md:1: the title is missing"),
        (
            "## Relations\n",
            "Text.\n",
            r"g\.md:3: expected '## Relations' or '## Rules', found 'Text",
        ),
        ("## Relations", "## Labels", r"g\.md:3: expected '## Relations' or '## Rules', found"),
        ("## Rules", "## Notes", r"g\.md:9: expected '## Rules', found '## Notes'"),
        ("2. Think", "## Relations", r"g\.md:12: expected no further heading, found"),
        ("merged_with(", "Cause-Effect(", r"g\.md:6: 'Cause-Effect' is defined twice"),
        ("**Other**", "**Cause-Effect**", r"g\.md:7: 'Cause-Effect' is defined twice"),
        (
            "- **Other**: none of them.",
            "- **A**: a\n- **B**: b",
            r"g\.md:8: a second none label, 'B'",
        ),
        ("- **Other**: none of them.", "- **A**: a\n- **A**: b", r"g\.md:8: 'A' is defined twice"),
        ("- **Other**", "**Other**", r"g\.md:7: cannot read '\*\*Other"),
        (": none of them.", ":", r"g\.md:7: cannot read"),
        ("X = cause, Y = effect", "cause, effect", r"g\.md:5: cannot read"),
        ("[no direction]", "[undirected]", r"g\.md:6: cannot read"),
        ("**Other**", "** **", r"g\.md:7: cannot read"),
        ("**Other**", "**<answer>**", r"g\.md:7: bad name '<answer>'"),
        ("Cause-Effect(", "</think>(", r"g\.md:5: bad name '</think>'"),
    ],
)
def test_guide_errors_name_the_line(old: str, new: str, message: str) -> None:
    assert old in GUIDE
    with pytest.raises(GuideError, match=message):
        parse_guide(GUIDE.replace(old, new, 1), source="g.md")


@pytest.mark.parametrize("text", ["# T\n", "# T\n## Relations\n", "# T\n## Rules\n1. r\n"])
def test_a_guide_without_relations_is_refused(text: str) -> None:
    with pytest.raises(GuideError, match="no relations; expected lines under '## Relations'"):
        parse_guide(text)


def test_a_guide_of_the_none_label_alone_is_refused() -> None:
    with pytest.raises(GuideError, match="no relations"):
        parse_guide("# T\n## Relations\n- **Other**: nothing\n")


def test_an_empty_guide_is_refused() -> None:
    with pytest.raises(GuideError, match="guide:1: the title is missing"):
        parse_guide(" \n\n")


def test_unreadable_guide_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(GuideError, match="no guide at .*absent.md"):
        load_guide(tmp_path / "absent.md")
    (tmp_path / "bytes.md").write_bytes(b"# \xff")
    with pytest.raises(GuideError, match="cannot read the guide .*bytes.md"):
        load_guide(tmp_path / "bytes.md")
    with pytest.raises(GuideError, match="cannot read the guide"):
        load_guide(tmp_path)


@given(st.text())
def test_any_text_is_a_guide_or_a_guide_error(text: str) -> None:
    try:
        assert isinstance(parse_guide(text), Guide)
    except GuideError:
        pass


WORDS = st.lists(
    st.sampled_from(["a", "b-c", "É", "<d>", "1.", "-", "_", "x:y", "no"]), min_size=1, max_size=3
).map(" ".join)


@given(
    st.lists(WORDS, min_size=1, max_size=6, unique=True),
    st.lists(st.tuples(WORDS, WORDS, st.booleans(), WORDS), min_size=5, max_size=5),
    st.booleans(),
    st.lists(WORDS, max_size=3),
)
def test_make_guide_and_parse_guide_are_inverse(
    names: list[str], fields: list[tuple[str, str, bool, str]], has_none: bool, rules: list[str]
) -> None:
    none = names.pop() if has_none and len(names) > 1 else None
    relations = tuple(Relation(name, *row) for name, row in zip(names, fields, strict=False))
    schema = Schema(relations, none)
    guide = make_guide("Title", schema, rules=rules)
    assert guide.schema == schema
    assert guide.rules == tuple(rules)
    assert parse_guide(guide.text) == guide


def test_make_guide_refuses_what_would_not_come_back() -> None:
    with pytest.raises(GuideError, match="plain single lines"):
        make_guide("T", Schema((Relation("R", "a ", "b", True, "d"),)))
    with pytest.raises(GuideError, match="cannot read"):
        make_guide("T", Schema((Relation("R", "a", "b", True, ""),)))


def test_an_example_shows_its_pair() -> None:
    assert CAT.tagged == "The <e1>cat</e1> sat <e2>here</e2>."
    assert CAT.between == " sat "
    assert CAT.gold == {"R(e1,e2)"}


def test_gold_is_the_label_and_all_further_labels() -> None:
    two = Example("1", CAT.text, CAT.head, CAT.tail, "A", ("A", "B"))
    assert two.gold == {"A", "B"}
    assert Example("1", CAT.text, CAT.head, CAT.tail).gold == frozenset()


@pytest.mark.parametrize(
    ("head", "tail", "message"),
    [
        (Mention("dog", 4, 7), CAT.tail, r"head is 'dog' but text\[4:7\] is 'cat'"),
        (CAT.head, Mention("here", 12, 17), r"tail is 'here' but text\[12:17\] is 'here\.'"),
        (CAT.head, Mention("here", 12, 99), r"tail \[12, 99\) is no span of a text of 17"),
        (Mention("", 4, 4), CAT.tail, r"head \[4, 4\) is no span"),
        (Mention("cat", -13, 7), CAT.tail, r"head \[-13, 7\) is no span"),
        (CAT.tail, CAT.head, r"head \[12, 16\) starts after tail \[4, 7\)"),
        (CAT.head, Mention("at sat", 5, 11), r"head \[4, 7\) overlaps tail \[5, 11\)"),
        (CAT.head, CAT.head, "overlaps"),
    ],
)
def test_spans_are_checked(head: Mention, tail: Mention, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Example("1", CAT.text, head, tail)


def test_neighbours_do_not_overlap() -> None:
    assert Example("1", "ab", Mention("a", 0, 1), Mention("b", 1, 2)).between == ""


@given(st.text("ab e<é\n"), st.text("ab", min_size=1), st.text("ab <"), st.text("ab", min_size=1))
def test_tagging_and_untagging_are_inverse(start: str, head: str, between: str, tail: str) -> None:
    tagged = f"{start}<e1>{head}</e1>{between}<e2>{tail}</e2>{start}"
    example = parse_tagged(tagged, id="7", label="Other")
    assert example.tagged == tagged
    assert (example.head.text, example.tail.text) == (head, tail)
    assert (example.id, example.label) == ("7", "Other")


@pytest.mark.parametrize(
    "tagged",
    [
        "no marks",
        "<e1>a</e1> b",
        "<e2>a</e2> <e1>b</e1>",
        "<e1>a <e2>b</e2></e1>",
        "<e1>a</e1> <e2>b</e2> <e1>c</e1>",
        "<e1>a</e1> <e2>b",
    ],
)
def test_marks_must_be_four_and_in_order(tagged: str) -> None:
    with pytest.raises(DataError, match="expected the marks"):
        parse_tagged(tagged)


def test_empty_marks_are_no_mention() -> None:
    with pytest.raises(DataError, match="is no span"):
        parse_tagged("<e1></e1> <e2>b</e2>")
