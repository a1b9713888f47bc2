"""Data files: every check of the contract with its file and line, and real corpora read whole."""

import dataclasses
import functools
import gzip
import json
import types
from pathlib import Path
from typing import Any

import pytest

from r1re_jax.task import readers
from r1re_jax.task.relations import DataError, Example, Mention, Relation, Schema, load_guide

SCHEMA = Schema((Relation("Cause-Effect"), Relation("merged_with", directed=False)), "Other")
ROW = {
    "id": "a",
    "text": "Rain brings mud.",
    "head": {"text": "Rain", "start": 0, "end": 4},
    "tail": {"text": "mud", "start": 12, "end": 15, "type": "STUFF"},
    "label": "Cause-Effect(e1,e2)",
}


def _write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_row_becomes_an_example(tmp_path: Path) -> None:
    more = {"split": "train", "domain": "d", "labels": ["Other"], "reasoning": "so", "extra": [1]}
    second = ROW | more | {"id": "b", "comment": None}
    path = _write(tmp_path / "x.jsonl", ROW, second)
    head, tail = Mention("Rain", 0, 4), Mention("mud", 12, 15, "STUFF")
    first = Example("a", ROW["text"], head, tail, "Cause-Effect(e1,e2)")
    assert readers.read_jsonl(path, schema=SCHEMA) == [
        first,
        dataclasses.replace(
            first, id="b", labels=("Other",), split="train", domain="d", reasoning="so"
        ),
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_writing_and_reading_are_inverse(tmp_path: Path, name: str) -> None:
    first = Example("a", "é b", Mention("é", 0, 1, "T"), Mention("b", 2, 3), "Other")
    second = dataclasses.replace(
        first, id="ü", labels=("Other", "merged_with"), split="s", domain="d", reasoning="r\n"
    )
    readers.write_jsonl(tmp_path / name, [first, second])
    assert readers.read_jsonl(tmp_path / name, schema=SCHEMA) == [first, second]
    bytes_before = (tmp_path / name).read_bytes()
    readers.write_jsonl(tmp_path / name, [first, second])
    assert (tmp_path / name).read_bytes() == bytes_before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_blank_lines_may_only_end_a_file(tmp_path: Path) -> None:
    good = _write(tmp_path / "good.jsonl", ROW, "", " ")
    assert len(readers.read_jsonl(good, schema=SCHEMA)) == 1
    bad = _write(tmp_path / "bad.jsonl", ROW, "", ROW | {"id": "b"})
    with pytest.raises(DataError, match=r"bad\.jsonl:2: a blank line"):
        readers.read_jsonl(bad, schema=SCHEMA)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n")
    assert readers.read_jsonl(path, schema=SCHEMA)[0].id == "a"


# Several tests compare with the official files, which are slow to read under coverage.
_official = functools.cache(readers.read_semeval2010)


def _without(key: str, of: str | None = None) -> dict[str, Any]:
    if of is None:
        return {name: value for name, value in ROW.items() if name != key}
    return ROW | {of: {name: value for name, value in ROW[of].items() if name != key}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ('{"id": 1} x', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("null", "expected a JSON object, found null"),
        ('"x"', "expected a JSON object, found a string"),
        (_without("id"), "the key 'id' is missing; found head, label, tail, text"),
        ({}, "the key 'id' is missing; found no key"),
        (_without("text"), "the key 'text' is missing"),
        (_without("head"), "the key 'head' is missing"),
        (_without("tail"), "the key 'tail' is missing"),
        (_without("label"), "the key 'label' is missing"),
        (_without("start", "head"), "the key 'head.start' is missing"),
        (_without("text", "tail"), "the key 'tail.text' is missing"),
        (ROW | {"id": 7}, "'id' must be a string, found an integer"),
        (ROW | {"id": ""}, "'id' must not be empty"),
        (ROW | {"text": None}, "'text' must be a string, found null"),
        (ROW | {"head": "Rain"}, "'head' must be an object, found a string"),
        (
            ROW | {"head": ROW["head"] | {"start": "0"}},
            "'head.start' must be an integer, found a s",
        ),
        (
            ROW | {"head": ROW["head"] | {"start": False}},
            "'head.start' must be an integer, found a b",
        ),
        (
            ROW | {"head": ROW["head"] | {"end": 4.0}},
            "'head.end' must be an integer, found a number",
        ),
        (ROW | {"tail": ROW["tail"] | {"type": 3}}, "'tail.type' must be a string"),
        (ROW | {"label": ["Other"]}, "'label' must be a string, found a list"),
        (ROW | {"labels": "Other"}, "'labels' must be a list, found a string"),
        (ROW | {"labels": ["Other", 1]}, "'labels' must be a list of strings, found an integer"),
        (ROW | {"split": 1}, "'split' must be a string"),
        (ROW | {"domain": {}}, "'domain' must be a string, found an object"),
        (ROW | {"reasoning": True}, "'reasoning' must be a string, found a boolean"),
        (
            ROW | {"head": ROW["head"] | {"text": "rain"}},
            r"head is 'rain' but text\[0:4\] is 'Rain'",
        ),
        (ROW | {"head": ROW["tail"], "tail": ROW["head"]}, "head .* starts after tail"),
        (ROW | {"tail": {"text": "ain", "start": 1, "end": 4}}, "overlaps"),
        (ROW | {"tail": {"text": "mud", "start": 12, "end": 99}}, "is no span"),
        (ROW | {"label": "Cause-Effect(e2, e1)"}, r"did you mean 'Cause-Effect\(e2,e1\)'"),
        (ROW | {"label": "Cause-Effect"}, "the guide has no label 'Cause-Effect'"),
        (ROW | {"label": "merged_with(e1,e2)"}, "did you mean 'merged_with'"),
        (ROW | {"label": "other"}, "did you mean 'Other'"),
        (ROW | {"label": ""}, "the guide has no label ''"),
        (ROW | {"labels": ["Effect"]}, "the guide has no label 'Effect'"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, row: Any, message: str) -> None:
    path = _write(tmp_path / "x.jsonl", ROW | {"id": "first"}, row)
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*" + message):
        readers.read_jsonl(path, schema=SCHEMA)


def test_ids_must_differ(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", ROW, ROW | {"id": "b"}, ROW)
    with pytest.raises(DataError, match=r"x\.jsonl:3: id 'a' is that of line 1 too"):
        readers.read_jsonl(path, schema=SCHEMA)


def test_rows_of_another_data_set_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", ROW | {"dataset": "core"})
    assert len(readers.read_jsonl(path, schema=SCHEMA, dataset="core")) == 1
    with pytest.raises(
        DataError, match=r"x\.jsonl:1: a row of data set 'core' in a file of 'mdkg'"
    ):
        readers.read_jsonl(path, schema=SCHEMA, dataset="mdkg")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jsonl: the file is empty"):
        readers.read_jsonl(tmp_path / "x.jsonl", schema=SCHEMA)


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n{\xff\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2: not UTF-8 \(invalid start byte at byte 1"):
        readers.read_jsonl(tmp_path / "x.jsonl", schema=SCHEMA)


@pytest.mark.parametrize("cut", [b"no gzip", gzip.compress(b"{}\n" * 9999, mtime=0)[:-12]])
def test_a_broken_gzip_file_is_refused(tmp_path: Path, cut: bytes) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(cut)
    with pytest.raises(DataError, match=r"x\.jsonl\.gz"):
        readers.read_jsonl(tmp_path / "x.jsonl.gz", schema=SCHEMA)


def test_data_is_found_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, data = tmp_path / "work", tmp_path / "data"
    for folder in (work, data):
        folder.mkdir()
        _write(folder / "both.jsonl", ROW)
    _write(data / "only.jsonl", ROW)
    monkeypatch.chdir(work)
    monkeypatch.setenv(readers.DATA_VARIABLE, str(data))
    assert readers.resolve_data("both.jsonl") == work / "both.jsonl"
    assert readers.resolve_data("only.jsonl") == data / "only.jsonl"
    assert readers.resolve_data(data / "only.jsonl") == data / "only.jsonl"


def test_missing_data_lists_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(readers.DATA_VARIABLE, raising=False)
    with pytest.raises(DataError, match="R1RE_DATA, the folder to look in next, is not set"):
        readers.resolve_data("x.jsonl")
    monkeypatch.setenv(readers.DATA_VARIABLE, str(tmp_path / "data"))
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(
        DataError, match=r"looked at\n  .*x\.jsonl \(a folder\)\n  .*data/x\.jsonl$"
    ):
        readers.read_jsonl("x.jsonl", schema=SCHEMA)


def test_the_digest_is_of_the_stored_bytes(shared: Path) -> None:
    assert readers.data_sha256(shared / "data" / "core" / "test.jsonl.gz") == (
        "1e9ebb7fed40683750a59fe2334db1bbcf93a92989be45807d436c05ef54a8d3"
    )


@pytest.mark.parametrize(
    ("corpus", "name", "n"),
    [
        ("core", "train.jsonl.gz", 4000),
        ("core", "test.jsonl.gz", 708),
        ("drugprot", "dev.jsonl.gz", 844),
        ("drugprot", "test.jsonl.gz", 2595),
        ("semeval2010", "train.jsonl", 8000),
        ("semeval2010", "test.jsonl", 2717),
    ],
)
def test_the_corpora_are_read_whole(
    shared: Path, monkeypatch: pytest.MonkeyPatch, corpus: str, name: str, n: int
) -> None:
    monkeypatch.setenv(readers.DATA_VARIABLE, str(shared / "data"))
    schema = load_guide(shared / "data" / corpus / "guideline.md").schema
    assert len(readers.read_jsonl(f"{corpus}/{name}", schema=schema, dataset=corpus)) == n


@pytest.mark.parametrize(
    ("raw", "name"), [("TRAIN_FILE.TXT", "train.jsonl"), ("TEST_FILE_FULL.TXT", "test.jsonl")]
)
def test_the_official_text_form_gives_the_same_examples(shared: Path, raw: str, name: str) -> None:
    folder = shared / "data" / "semeval2010"
    schema = load_guide(folder / "guideline.md").schema
    official = _official(folder / "raw" / raw)
    assert official == readers.read_jsonl(folder / name, schema=schema)


def test_the_official_text_form_without_labels(shared: Path) -> None:
    folder = shared / "data" / "semeval2010" / "raw"
    clean = readers.read_semeval2010(folder / "TEST_FILE_CLEAN.TXT")
    full = _official(folder / "TEST_FILE_FULL.TXT")
    assert clean == [dataclasses.replace(example, label="") for example in full]
    assert {example.gold for example in clean} == {frozenset()}


OFFICIAL = (
    '1\t"An <e1>a</e1> <e2>b</e2>."\nOther\nComment: none\n\n2\t"<e1>c</e1><e2>d</e2>"\nOther\n'
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Other\nComment", "Othr\nComment", r"x\.txt:2: expected '<number> TAB"),
        ("Comment: none", "Remark", r"x\.txt:3: expected"),
        ("1\t", "1 ", r"x\.txt:1: expected"),
        ("Other\nComment", "Comment", r"x\.txt:2: expected"),
        ("<e2>d</e2>", "d", r"x\.txt:5: expected the marks"),
        ("2\t", "1\t", r"x\.txt:5: id 'semeval2010-1' is that of line 1 too"),
    ],
)
def test_faults_of_the_official_form_are_refused_by_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "x.txt").write_text(OFFICIAL)
    assert len(readers.read_semeval2010(tmp_path / "x.txt")) == 2
    (tmp_path / "x.txt").write_text(OFFICIAL.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        readers.read_semeval2010(tmp_path / "x.txt")


def test_an_empty_official_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n\n")
    with pytest.raises(DataError, match="the file is empty"):
        readers.read_semeval2010(tmp_path / "x.txt")


class _Table(dict[str, list[Any]]):
    """Columns and features, as a table of `datasets` has them."""

    def __init__(self, examples: list[Example]) -> None:
        names = sorted({example.label for example in examples})
        super().__init__(
            sentence=[example.tagged for example in examples],
            relation=[names.index(example.label) for example in examples],
        )
        self.features = {"relation": types.SimpleNamespace(names=names)}


@pytest.mark.parametrize(("split", "raw"), [("train", "TRAIN_FILE"), ("test", "TEST_FILE_FULL")])
def test_the_hub_gives_the_same_examples(
    shared: Path, monkeypatch: pytest.MonkeyPatch, split: str, raw: str
) -> None:
    import datasets

    path = shared / "data" / "semeval2010" / "raw" / f"{raw}.TXT"
    official = _official(path)[:200]

    def load(name: str, *, split: str) -> _Table:
        assert name == readers.HUB_SEMEVAL2010
        assert split in raw.lower()
        return _Table(official)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert readers.load_hub_semeval2010(split) == official


def test_the_hub_has_two_splits() -> None:
    with pytest.raises(DataError, match="'train' and 'test', found 'dev'"):
        readers.load_hub_semeval2010("dev")


def test_packaged_guides_are_found_by_name(shared: Path) -> None:
    short = readers.packaged_guide("semeval2010_short")
    full = load_guide(shared / "data" / "semeval2010" / "guideline.md")
    assert short.schema.labels == full.schema.labels
    with pytest.raises(DataError, match="no packaged guide 'semeval'; there are: .*semeval2010_sh"):
        readers.packaged_guide("semeval")
