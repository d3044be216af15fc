"""The results of each transformers release, and docs/families.md made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .check import Row


def counts(rows: Sequence[Row]) -> str:
    found = Counter(row.verdict for row in rows)
    faults = {kind: sum(len(getattr(row, kind)) for row in rows) for kind in ("silent", "wrong", "tower")}
    return f"{len(rows)} families: {dict(found)}, {faults}"


def save(rows): ...
def write_page(): ...
