"""The code blocks of the README and of docs, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def _fenced(text: str) -> list[tuple[str, str]]:
    """Language and contents of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def blocks() -> list[str]:
    """Those of all pages that are not shell commands."""
    return [block for page in PAGES for language, block in _fenced(page.read_text()) if language != "bash"]


def block_with(words: str) -> str:
    """The only one that contains these words."""
    (found,) = [block for block in blocks() if words in block]
    return found


def commands_in(page: Path, program: str = "") -> list[str]:
    """The shell commands of a page's blocks that call a program, without comments, each on one line."""
    text = "".join(block for language, block in _fenced(page.read_text()) if language == "bash")
    lines = [line.partition("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(program)]
