"""Fills the tables of pages from results/. Run it after `figures`, so that the pages match the JSON files.

A table is between two comments; the first gives the experiment, the scores and, if not all are shown, the entries:

    <!-- digit_sums: main | held_out_sums, reading | SFT; adaptive_cosine, anchor -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from . import report
from .analysis import Result

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

_TABLE = re.compile(r"(<!-- digit_sums: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def results() -> dict[str, Result]:
    """The committed results, by experiment."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def filled(page: str, found: dict[str, Result]) -> str:
    """The page with its tables filled in.

    Raises:
        KeyError: if a table's experiment or entry does not exist.
    """
    return _TABLE.sub(lambda table: table[1] + _table(table[2], found) + table[3], page)


def _table(what: str, found: dict[str, Result]) -> str:
    name, scores, *some = (part.strip() for part in what.split("|"))
    result = found[name]
    if some:
        entries = {entry["name"]: entry for entry in result["entries"]}
        result = {**result, "entries": [entries[entry.strip()] for entry in some[0].split(";")]}
    return report.markdown(result, [score.strip() for score in scores.split(",")])


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), Path(__file__).parent / "README.md"]


def main() -> None:
    found = results()
    for path in pages():
        path.write_text(filled(path.read_text(), found))


if __name__ == "__main__":
    main()
