"""A domain from sentences and labels: what is read, refused and held out."""

import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.task.own_data import TODO, Domain, prepare
from r1re_jax.task.readers import read_jsonl
from r1re_jax.task.relations import DataError, load_guide

ROOT = pathlib.Path(__file__).resolve().parents[2]
LABELS = "Caused-By: X is a failure, Y is what brought it about.\nSame-As\nNone\n"
ROWS = [
    ('"The <e1>outage</e1>, at last, was traced to a <e2>bug</e2>."', '"Caused-By(e1,e2)"'),
    ("A <e1>full disk</e1> stopped the <e2>queue</e2>.", '"Caused-By(e2, e1)"'),
    ("<e1>DNS</e1> is the <e2>name service</e2>.", "Same-As"),
    ("The <e1>disk</e1> has a <e2>name</e2>.", "None"),
    ("The <e1>cat</e1> saw the <e2>queue</e2>.", "None"),
]


def files(folder: pathlib.Path, rows: list[tuple[str, str]], labels: str = LABELS) -> Domain:
    folder.mkdir(exist_ok=True)
    text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    (folder / "s.csv").write_text(text)
    (folder / "l.txt").write_text(labels)
    return prepare(folder / "s.csv", folder / "l.txt", title="Incidents")


def test_labels_become_a_guide_and_sentences_examples(tmp_path: pathlib.Path) -> None:
    domain = files(tmp_path, ROWS)
    schema = domain.guide.schema
    assert schema.labels == ("Caused-By(e1,e2)", "Caused-By(e2,e1)", "Same-As", "None")
    assert schema.none == "None" and not schema.relations[1].directed
    assert schema.relations[0].definition == "X is a failure, Y is what brought it about."
    assert schema.relations[1].definition.startswith(TODO)
    assert domain.unsaid == 5, "four roles and a definition"
    first = next(one for one in (*domain.train, *domain.test) if one.id == "s-1")
    assert first.text == "The outage, at last, was traced to a bug."
    assert (first.head.text, first.tail.text) == ("outage", "bug")


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_every_label_is_held_out_by_its_share(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("d")
    rows = [f"a <e1>b</e1> c <e2>d{i}</e2>,R{n}\n" for n, k in enumerate(counts) for i in range(k)]
    (folder / "s.csv").write_text("text,label\n" + "".join(rows))
    (folder / "l.txt").write_text("".join(f"R{n}\n" for n in range(len(counts))))
    made = [
        prepare(folder / "s.csv", folder / "l.txt", title="t", held_out=share, seed=seed)
        for _ in range(2)
    ]
    assert made[0] == made[1], "the split is a function of the seed"
    ids = [one.id for one in (*made[0].train, *made[0].test)]
    assert sorted(ids) == sorted({f"s-{i + 1}" for i in range(sum(counts))})
    for count, (train, test) in zip(counts, made[0].counts().values(), strict=True):
        assert train + test == count and test >= 1
        assert test == 1 or test < share * count + 1
        assert train >= 1 or count == 1


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([("no marks", "None")], LABELS, r"s\.csv:2: expected the marks <e1>"),
        ([("<e1>a</e1> <e2>b</e2>", "Same-Az")], LABELS, r"s\.csv:2: .*did you mean 'Same-As'"),
        ([("<e1>a</e1> <e2>b</e2>", "")], LABELS, r"s\.csv:2: '' is not in the list"),
        ([], LABELS, "no sentences below the header"),
        (ROWS, "\n", r"l\.txt: no labels"),
        (ROWS, LABELS + "None: again\n", r"l\.txt:4: 'None' is listed twice"),
        ([*ROWS, ("<e1>a</e1> <e2>b</e2>", "Caused-By")], LABELS, "Caused-By"),
    ],
)
def test_a_bad_line_is_refused_by_its_place(
    tmp_path: pathlib.Path, rows: list[tuple[str, str]], labels: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        files(tmp_path, rows, labels)


def test_other_columns_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "s.tsv").write_text("sentence\tlabel\nx\tNone\n")
    (tmp_path / "l.txt").write_text(LABELS)
    with pytest.raises(DataError, match=r"s\.tsv:1: no column text; found sentence, label"):
        prepare(tmp_path / "s.tsv", tmp_path / "l.txt", title="t")


def test_the_command_writes_what_evaluation_reads_and_overwrites_nothing(
    tmp_path: pathlib.Path,
) -> None:
    files(tmp_path, ROWS)
    command = [sys.executable, "-m", "run.prepare", f"--sentences={tmp_path / 's.csv'}"]
    command += [f"--labels={tmp_path / 'l.txt'}", f"--out={tmp_path / 'incidents'}"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "5 places to fill in, marked TODO" in first.stdout
    guide = load_guide(tmp_path / "incidents" / "guide.md")
    assert guide.title == "incidents"
    both = [
        read_jsonl(tmp_path / "incidents" / f"{name}.jsonl", schema=guide.schema)
        for name in ("train", "test")
    ]
    assert sum(map(len, both)) == len(ROWS)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "nothing was written" in again.stderr
