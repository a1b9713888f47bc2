"""Every message that the FAQ quotes is one that the code can give."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUOTES = re.findall(r"^> (.+)$", (ROOT / "docs" / "faq.md").read_text("utf-8"), re.M)
# Shorter pieces between two … are found anywhere.
SHORTEST = 8


def _texts() -> list[str]:
    """The constant parts of every text in the code; neighbouring literals are one."""
    found = []
    for room in ("r1re_jax", "run"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append(" ".join("".join(parts).split()))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(" ".join(node.value.split()))
    return found


TEXTS = _texts()


def test_the_page_quotes_messages() -> None:
    assert len(QUOTES) > 12


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    pieces = [piece.strip() for piece in quote.split("…")]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    assert pieces
    for piece in pieces:
        assert any(piece in text for text in TEXTS), piece
