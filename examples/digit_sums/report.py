"""Results as tables, in the terminal and in Markdown, and as JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .analysis import SCORES, Result

Estimate = dict[str, Any]  # mean, low and high, of shares

MEANINGS = {
    "held_out_sums": "digit pairs whose sum no image example showed",
    "seen_sums": "the fine-tuning's digit pairs, on new images",
    "reading": "both digits are named correctly, whatever follows",
    "single_digits": "a single image; the answer begins with its digit",
    "single_answers": "a single image; the answer is its digit and nothing else",
}


def percent(value: Estimate) -> str:
    """Format as "43.8 [41.2, 46.1]", or "43.8" for one seed."""
    mean = f"{100 * value['mean']:.1f}"
    return mean if value["low"] is None else f"{mean} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def points(value: Estimate) -> str:
    """Format a difference as "+12.4 [+5.0, +20.1]"."""
    mean = f"{100 * value['mean']:+.1f}"
    return mean if value["low"] is None else f"{mean} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def rate(value: float) -> str:
    """Format as "2.5e-4" or "5e-3"."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def setting(entry: dict[str, Any], name_expert: bool) -> str:
    """Describe an entry's chosen settings, the energy that its prior keeps, and its expert's score."""
    arm = entry["arm"]
    words = []
    if arm["merge"]:
        words.append(f"weight {arm['merge']:g}")
    if arm["vector"] == "ties":
        words.append(f"density {arm['density']:g}")
    if arm["scaling"]:
        words.append(f"alpha {arm['alpha']:g}")
    if entry["lr"]:
        words.append(f"lr {rate(entry['lr'])}")
    if entry["kept_energy"]:
        words.append(f"{100 * entry['kept_energy']:.0f} % of the energy")
    if name_expert and (arm["merge"] or arm["scaling"]):
        words.append(f"expert {100 * entry['expert']:.0f} % right")
    return ", ".join(words)


def rows(result: Result, scores: Sequence[str]) -> list[list[str]]:
    """Return a heading, and a row per entry: name, setting, scores, and held-out sums against the references."""
    references = [line for line in result["references"] if any(line in entry["against"] for entry in result["entries"])]
    main = scores[0]
    heading = [
        "",
        "setting",
        *(SCORES[score] for score in scores),
        *(f"{SCORES[main]}, against {line}" for line in references),
    ]
    body = [
        [
            entry["name"],
            setting(entry, name_expert=len({entry["expert"] for entry in result["entries"]}) > 1),
            *(percent(entry["scores"][score]) for score in scores),
            *(points(entry["against"][line][main]) if line in entry["against"] else "" for line in references),
        ]
        for entry in result["entries"]
    ]
    return [heading, *body]


def table(result: Result, scores: Sequence[str]) -> Table:
    """A table for the terminal: the scores, and what they mean."""
    interval = " [95 %]" if result["entries"][0]["scores"][scores[0]]["low"] is not None else ""
    made = Table(
        title=f"{result['question']} (in %, means of {len(result['seeds'])} seeds{interval})",
        caption="\n".join(f"{SCORES[score]}: {MEANINGS[score]}" for score in scores),
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("", overflow="fold")
    for score in scores:
        made.add_column(SCORES[score], justify="right")
    for entry in result["entries"]:
        made.add_row(entry["name"], *(percent(entry["scores"][score]) for score in scores))
    return made


def markdown(result: Result, scores: Sequence[str]) -> str:
    """A Markdown table for a page."""
    heading, *body = rows(result, scores)
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_json(out: Path, result: Result) -> Path:
    """Write the JSON file, with each list of numbers on one line; return its path."""
    text = json.dumps(result, indent=1)
    text = re.sub(
        r"\[\s*([-\d.eE+,\s]+?)\s*\]", lambda found: f"[{', '.join(found[1].replace(',', ' ').split())}]", text
    )
    path = out / f"{result['experiment']}.json"
    path.write_text(text + "\n")
    return path
