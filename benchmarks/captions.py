"""Rows in words: their numbers and their commit, as tables and plots show them."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def number(x: float) -> str:
    """Three digits, or all those before the point."""
    return f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2}f}"


def commit(row: Row) -> str:
    """The one that was measured."""
    if row["commit"] is None:
        return "no commit"
    return f"commit {row['commit'][:10]}{' + changes' if row['dirty'] else ''}"
