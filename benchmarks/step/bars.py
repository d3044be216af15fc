"""The rows of a step benchmark as bars: python -m benchmarks.step.bars ROWS.json PLOT.png"""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..captions import Row, number
from ..redraw import redraw
from .contender import LIMITS
from .modes import label_of
from .table import caption, section_title, title

OURS, RIVAL, BASELINE = "#1f6f5c", "#c9ccd1", "#7d838c"
INK, FAINT = "#222222", "#666666"
CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # keeps lines out of text
SECTION_GAP = 1.5  # in bars
LONGEST = 6.0  # relative to torch's fused AdamW


def draw(rows: list[Row], path: Path) -> None:
    """Draw each contender's time relative to torch's fused AdamW without a prior, as horizontal bars with quartiles."""
    rows = [row for row in rows if row["contender"] not in LIMITS]
    places: list[float] = []
    headings: list[tuple[float, str]] = []
    bottom = 0.0
    for heading, section in groupby(rows, key=section_title):
        headings.append((bottom, heading))
        count = len(list(section))
        places += [bottom + 1 + i for i in range(count)]
        bottom += count + SECTION_GAP

    ratios = [row["ratio_to_fused"] for row in rows]
    # Bars and quartiles are cut at LONGEST; otherwise one slow rival would shrink all other bars to nothing.
    widest = min(LONGEST, max(ratio["high"] for ratio in ratios))
    medians = [min(ratio["median"], widest) for ratio in ratios]
    below = [max(0.0, median - ratio["low"]) for median, ratio in zip(medians, ratios, strict=True)]
    above = [min(ratio["high"], widest) - median for median, ratio in zip(medians, ratios, strict=True)]

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 1.5 + 0.27 * bottom), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(places, medians, color=[_color(row) for row in rows], height=0.78, zorder=2)
        axes.errorbar(medians, places, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2, zorder=3)
        axes.axvline(1, color=BASELINE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for place, heading in headings:
            axes.text(0, place, heading, va="center", style="italic", color=FAINT, bbox=CLEAR)
        for place, row, ratio in zip(places, rows, ratios, strict=True):
            weight = "bold" if row["ours"] else "normal"
            if ratio["median"] > widest:
                axes.text(0.97 * widest, place, "//", va="center", ha="right", color="white", fontweight="bold")
            after = min(ratio["high"], widest) + 0.012 * widest
            axes.text(after, place, _note(row), va="center", fontsize=8, fontweight=weight, bbox=CLEAR)
        axes.set_yticks(places, [_label(row) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row["ours"] else "normal")

        axes.set_xlim(0, 1.3 * widest)
        axes.set_ylim(bottom - SECTION_GAP + 1, -0.6)
        axes.set_xlabel("time per step, torch's fused AdamW without a prior = 1 (bars: median, lines: quartiles)")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e6e6e6", zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(textwrap.fill(title(rows[0]), 110), fontsize=10, fontweight="bold", x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(caption(rows[0]), 150), fontsize=7, color=FAINT, x=0.01, ha="left")
        figure.savefig(path, dpi=150)


def _color(row: Row) -> str:
    if row["ours"]:
        return OURS
    return BASELINE if row["contender"] == "fused" else RIVAL


def _label(row: Row) -> str:
    return f"{row['label']}, {label_of(row)}" if row["ours"] else row["label"]


def _note(row: Row) -> str:
    parts = [f"{row['ratio_to_fused']['median']:.2f}x", f"{number(row['ms']['median'])} ms"]
    if row["gb_per_s"] is not None:
        parts.append(f"{number(row['gb_per_s'])} GB/s")
    return "   ".join(parts)


def main(argv: list[str] | None = None) -> None:
    redraw("benchmarks.step.bars", draw, argv)


if __name__ == "__main__":
    main()
