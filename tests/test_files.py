"""Files of this machine and of a bucket: written whole, grown by lines, fetched and refused."""

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from r1re_jax import files
from r1re_jax.files import PlaceError, place
from r1re_jax.report.writers import JsonlWriter, TensorBoardWriter, read_metrics
from r1re_jax.task.readers import data_sha256, read_jsonl, resolve_data, write_jsonl
from r1re_jax.task.relations import DataError, load_guide
from tests.fake_gcs import FakeGCS
from tests.tiny import GUIDE, tiny_examples, tiny_guide


@pytest.fixture(params=["local", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> epath.Path:
    """An empty folder, here and in a bucket."""
    if request.param == "local":
        return place(tmp_path)
    return place(f"{request.getfixturevalue('bucket')}/some/where")


def test_a_local_path_is_what_it_was(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("a/../b") == pathlib.Path("a/../b")
    assert files.absolute(place("a/../b")) == tmp_path / "a/../b", "a may be a link"
    assert not files.is_remote(tmp_path)
    odd = place(tmp_path / "[x] *")
    files.write(odd / ".hidden", "é\n")
    assert files.children(odd) == [odd / ".hidden"], "names are no patterns"
    assert (tmp_path / "[x] *" / ".hidden").read_bytes() == b"\xc3\xa9\n"


def test_files_are_written_read_and_removed(folder: epath.Path) -> None:
    assert files.children(folder / "deep") == []
    files.write(folder / "deep" / "text", "é\r\n")
    files.write(folder / "deep" / "empty", b"")
    files.write(folder / "deep" / "text", "\ufeffnow\r\n")
    assert [path.name for path in files.children(folder / "deep")] == ["empty", "text"]
    assert files.read_text(folder / "deep" / "text") == "\ufeffnow\n"
    assert files.read_text(folder / "deep" / "text", "utf-8-sig") == "now\n"
    with files.open_bytes(folder / "deep" / "text") as file:
        assert file.read() == "\ufeffnow\r\n".encode()
    free = files.free_bytes(folder)
    assert (free is None) is files.is_remote(folder)
    files.remove(folder / "deep" / "empty")
    assert [path.name for path in files.children(folder)] == ["deep"], "the probe is gone"
    files.remove(folder / "deep")
    assert files.children(folder) == []
    with pytest.raises(FileNotFoundError):
        files.read_text(folder / "absent")


def test_large_objects_and_pages_of_many(bucket: str) -> None:
    data = os.urandom(6_000_000)
    files.write(place(f"{bucket}/large"), data)
    with files.open_bytes(place(f"{bucket}/large")) as file:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(data).digest()
    for number in range(60):
        files.write(place(f"{bucket}/many/{number:02d}"), "")
    assert len(files.children(place(f"{bucket}/many"))) == 60
    files.remove(place(f"{bucket}/many"))
    assert files.children(place(f"{bucket}/many")) == []


def test_what_others_wrote_is_seen(gcs: FakeGCS, bucket: str) -> None:
    folder = place(f"{bucket}/folder")
    assert not folder.exists()
    assert files.children(folder) == []
    gcs.put(f"{bucket}/folder/", b"")  # the mark of an empty folder
    assert files.children(folder) == []
    gcs.put(f"{bucket}/folder/new", b"1")
    assert files.children(folder) == [folder / "new"]
    gcs.put(f"{bucket}/folder/new", b"2")
    assert files.read_text(folder / "new") == "2"


def test_folders_are_fetched_and_written(folder: epath.Path) -> None:
    with files.written(folder / "out", last="a") as here:
        (here / "deep").mkdir(parents=True)
        (here / "a").write_text("1")
        (here / "deep" / "b").write_text("2")
        if files.is_remote(folder):
            assert not (folder / "out").exists(), "nothing is there before all is"
    with files.fetched(folder / "out") as here:
        assert (here.name, (here / "deep" / "b").read_text()) == ("out", "2")
    with files.fetched(folder / "out" / "a") as here:
        assert here.read_text() == "1"
    assert here.exists() is not files.is_remote(folder), "a copy is removed"


def test_an_upload_that_fails_leaves_nothing(
    gcs: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload() -> None:
        with files.written(place(f"{bucket}/out"), last="config.json") as here:
            here.mkdir()
            for name in ("config.json", "weights", "words"):
                (here / name).write_text(name)

    monkeypatch.setitem(gcs.fail, ("WRITE", "words"), (403, "no"))
    with pytest.raises(OSError, match="Forbidden"):
        upload()
    assert gcs.names(bucket) == []
    gcs.fail.clear()
    upload()
    order = [name for name in gcs.buckets[bucket[5:]]]
    assert order == ["out/weights", "out/words", "out/config.json"]


def test_lines_of_a_file_are_there_at_once(tmp_path: pathlib.Path) -> None:
    synced: list[int] = []
    lines = files.open_lines(place(tmp_path / "new" / "f"), after=synced.append)
    lines.add("one\n")
    assert (tmp_path / "new" / "f").read_text() == "one\n"
    lines.add("two\nthree\n")
    assert len(synced) == 2
    lines.flush()
    lines.close()
    files.open_lines(place(tmp_path / "new" / "f")).close()
    assert (tmp_path / "new" / "f").read_text() == "one\ntwo\nthree\n"


def test_lines_of_an_object_are_held_back_until_it_is_time(
    gcs: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{bucket}/f"
    lines = files.open_lines(place(path))
    lines.close()
    assert gcs.names(bucket) == []
    lines.add("one\n")
    assert gcs.names(bucket) == []
    lines.flush()
    assert gcs.read(path) == b"one\n"
    lines.add("two\n")
    monkeypatch.setattr(files, "monotonic", lambda: 1e9)
    lines.add("three\n")
    assert gcs.read(path) == b"one\ntwo\nthree\n"
    lines.add("four\n")
    lines.close()
    uploads = len(gcs.requests)
    lines.close()
    assert len(gcs.requests) == uploads, "what is there is not uploaded again"
    again = files.open_lines(place(path))
    again.add("five\n")
    again.close()
    assert gcs.read(path) == b"one\ntwo\nthree\nfour\nfive\n"


def test_metrics_in_a_bucket_go_on_as_those_of_a_file(gcs: FakeGCS, bucket: str) -> None:
    path = f"{bucket}/run/metrics.jsonl"
    writer = JsonlWriter(path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.flush()
    writer.write(4, {"loss": 2.0})  # and the process is killed
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    again = JsonlWriter(path, resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    again.write(3, {"again": True})
    again.close()
    assert gcs.read(path).decode().splitlines() == [
        '{"step": 1, "loss": 0.5}',
        '{"step": 2, "loss": 1.0}',
        '{"step": 3, "again": true}',
    ]


def test_events_are_uploaded(gcs: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoardWriter(f"{bucket}/run/tensorboard", resume_step=3)
    writer.write(4, {"loss": 1.5, "phase": "sft"})
    assert gcs.names(bucket) == []
    writer.flush()
    (name,) = gcs.names(bucket)
    first = gcs.read(f"{bucket}/{name}")
    monkeypatch.setattr(files, "monotonic", lambda: 1e9)
    uploads = len(gcs.requests)
    writer.write(5, {"reward": 2.5})
    assert len(gcs.requests) > uploads, "a minute has passed"
    writer.close()
    assert gcs.names(bucket) == [name]
    last = gcs.read(f"{bucket}/{name}")
    assert last.startswith(first)
    assert b"loss" in last
    assert b"reward" in last


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_data_is_read_from_a_bucket(
    name: str, bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, schema = tiny_examples(5), tiny_guide().schema
    write_jsonl(tmp_path / name, examples)
    write_jsonl(f"{bucket}/data/{name}", examples)
    files.write(place(f"{bucket}/data/guide.md"), "\ufeff" + GUIDE.replace("\n", "\r\n"))
    assert load_guide(f"{bucket}/data/guide.md") == tiny_guide()
    assert read_jsonl(f"{bucket}/data/{name}", schema=schema) == examples
    assert data_sha256(f"{bucket}/data/{name}") == data_sha256(tmp_path / name)
    monkeypatch.setenv("R1RE_DATA", f"{bucket}/data")
    assert resolve_data(name) == place(f"{bucket}/data/{name}")
    assert read_jsonl(name, schema=schema) == examples
    with pytest.raises(DataError, match=rf"looked at\n  .*absent\n  {bucket}/data/absent"):
        resolve_data("absent")


def test_a_bucket_that_is_not_there_costs_one_line(gcs: FakeGCS) -> None:
    with pytest.raises(
        PlaceError, match=r"there is no bucket gs://nowhere: .* buckets create"
    ) as e:
        place("gs://nowhere/run")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "Anonymous caller does not have storage.objects.list access to the bucket."),
        (403, "ann@x.test does not have storage.objects.list access to the bucket."),
    ],
)
def test_credentials_that_do_not_suffice_cost_one_line(
    status: int, message: str, gcs: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gcs.fail, ("GET", bucket[5:]), (status, message))
    expected = rf"{bucket} cannot be used: .*{message[:20]}.* Log in with `gcloud auth .*role"
    with pytest.raises(PlaceError, match=expected) as found:
        place(f"{bucket}/run")
    assert "\n" not in str(found.value)
    gcs.fail.clear()
    files.check_bucket(place("a/run"))
    run = place(f"{bucket}/run")
    assert not run.exists(), "it is asked again"
    monkeypatch.setitem(gcs.fail, ("GET", f"/b/{bucket[5:]}"), (status, message))
    with pytest.raises(PlaceError, match=expected):
        files.check_bucket(run)


@pytest.mark.parametrize("name", ["gs:/bucket/run", "gs://", "s3://bucket/run", "https://x.test/a"])
def test_other_addresses_are_refused(name: str) -> None:
    with pytest.raises(PlaceError, match=r"expected .*gs://BUCKET/"):
        place(name)


def test_without_gcsfs_it_is_said_what_to_install() -> None:
    program = """
import sys
sys.modules["gcsfs"] = None
from r1re_jax.files import PlaceError, place
try:
    place("gs://bucket/run")
except PlaceError as error:
    print(error)
"""
    run = [sys.executable, "-c", program]
    said = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == "gs://bucket needs gcsfs, which is not installed: pip install gcsfs\n"
