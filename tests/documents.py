"""The code blocks of the README and the docs, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks() -> list[str]:
    """All fenced code blocks."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    return [block for text in texts for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def block_with(words: str) -> str:
    """The block that contains these words."""
    (found,) = [block for block in blocks() if words in block]
    return found
