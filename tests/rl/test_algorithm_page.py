"""docs/algorithm.md names tests that exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    """`file.py::test` names a file of tests/rl or a path; `::test` goes on with the last file."""
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    named, path = 0, None
    for file, name in re.findall(r"`([\w/]+\.py)?::(test_\w+)`", page):
        if file:
            path = ROOT / file if "/" in file else ROOT / "tests" / "rl" / file
        assert path is not None, f"{name}: no file before it"
        defined = re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert defined, f"{path.name} has no {name}"
        named += 1
    assert named == len(re.findall(r"::test_", page)) > 20
