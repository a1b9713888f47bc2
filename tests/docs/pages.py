"""The blocks of README and docs: commands, marked `cpu` or `tpu`, and files that they need."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
)
MARKS = ("cpu", "tpu")
_FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.M | re.S)
# What a command outside of a block would begin with.
_COMMAND = re.compile(
    r"^ {2,}(?:[A-Z_0-9]+=\S+ )*(?:\.venv/bin/)?(?:python|pip|bash|gcloud|sky|hf|git)\S* .*",
    re.M,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        language: as it says.
        words: what stands behind the language.
        text: within the fences.
    """

    language: str
    words: tuple[str, ...]
    text: str

    @property
    def mark(self) -> str | None:
        """`cpu` or `tpu`, of a block that is executed."""
        return next((word for word in self.words if word in MARKS), None)

    @property
    def file(self) -> str | None:
        """The file that the block is, where it is one."""
        names = [word.partition("=")[2] for word in self.words if word.startswith("file=")]
        return names[0] if names else None

    @property
    def commands(self) -> list[str]:
        """One a line, continued lines joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        lines = [re.sub(r"\s+#\s.*", "", line).strip() for line in lines]
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(language=language, words=tuple(words.split()), text=inner)
        for language, words, inner in _FENCE.findall(text)
    ]


def stray_commands(page: str) -> list[str]:
    """Indented commands, which no block marks."""
    return _COMMAND.findall(_FENCE.sub("", (ROOT / page).read_text("utf-8")))
