"""Formats the numbers and the commit of rows for tables and plots."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def number(x: float) -> str:
    """Format with three digits, or with all digits before the decimal point."""
    return f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2}f}"


def commit(row: Row) -> str:
    """The commit that was measured."""
    if row["commit"] is None:
        return "no commit"
    return f"commit {row['commit'][:10]}{' + changes' if row['dirty'] else ''}"
