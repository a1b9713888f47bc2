"""The report: its figures, that hostile text stays text, and that half a run has one too."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from r1re_jax.report.html import confusion, write_report

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the curves but do not render them, which takes most of a page's time."""
    monkeypatch.setattr("r1re_jax.report.curves.png", lambda figure: b"")


class _Page(html.parser.HTMLParser):
    """Collects tags, links and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_self_contained_and_text_stays_text(workdir: pathlib.Path) -> None:
    path = write_report(workdir)
    assert path == workdir / "report.html"
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert "script" not in page.tags
    assert any(HOSTILE in word for word in page.words)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?://", text)
    for shown in ("The <e1>storm</e1> broke the <e2>mast</e2>.", "base:miniworld", "0123456789ab"):
        assert any(shown in word for word in page.words), shown
    for outcome in ("correct", "wrong", "malformed"):
        assert f'class="completion {outcome}"' in text
    assert "advantage −0.50" in text
    assert list(workdir.glob("*.tmp")) == []
    assert {path.stem for path in workdir.glob("curves/*.png")} >= {"accuracy", "reward"}


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_it_without_a_complaint(
    workdir: pathlib.Path, tmp_path: pathlib.Path, scheme: str
) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    flags += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    found = subprocess.run(
        [chromium, *flags, write_report(workdir).as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in found.stderr
    page = _Page(found.stdout)
    assert "script" not in page.tags and any(HOSTILE in word for word in page.words)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "missing",
    ["config.json", "metrics.jsonl", "eval", "completions", "eval/10-ood/predictions.jsonl"],
)
def test_a_missing_part_is_left_out(workdir: pathlib.Path, missing: str) -> None:
    target = workdir / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert "<h1>run</h1>" in write_report(workdir).read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"avg_at_k": "high", "ci95": [null], "confusion": 3}']
)
def test_broken_files_are_named_or_shown_as_unknown(workdir: pathlib.Path, content: str) -> None:
    for name in ("config.json", "eval/10-ood/metrics.json", "eval/10-ood/evaluate.json"):
        (workdir / name).write_text(content)
    (workdir / "eval/10-ood/predictions.jsonl").write_text("oops\n3\n" + content + "\n")
    text = write_report(workdir).read_text(encoding="utf-8")
    assert ("metrics.json" in text) == (content in ("", "{", "[]"))


@pytest.mark.usefixtures("quick")
def test_unfinished_evaluation_is_named(workdir: pathlib.Path) -> None:
    (workdir / "eval" / "10-ood" / "metrics.json").unlink()
    assert "eval/10-ood is not finished" in write_report(workdir).read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick")
def test_metrics_alone_are_enough(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "there are no finished evaluations" in text
    assert "data:image/png" in text


def test_a_folder_without_a_run_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run: expected config.json"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="no work directory at"):
        write_report(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_confusion_shows_the_most_frequent_labels() -> None:
    table = {f"R{i:02}": {f"R{i:02}": i + 1, "malformed": 1, "zz": 1} for i in range(30)}
    shown = confusion(table)
    assert shown is not None
    assert [row[0] for row in shown["rows"]][:2] == ["R29", "R28"]
    assert len(shown["rows"]) == 24
    assert shown["left_out"] == 30 - 24 + 1  # one of the two answers outside gold is shown
    label, cells, total = shown["rows"][0]
    assert (cells[0].count, cells[0].right, total) == (30, True, 32)
    assert confusion(None) is None
