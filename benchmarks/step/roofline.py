"""The rows of a step benchmark as bytes against time: python -m benchmarks.step.roofline ROWS.json PLOT.png

On a GPU, a step that moves b bytes per parameter takes at least as long as a copy of b bytes, so no point is below that
line. On a CPU, a copy moves more bytes than are counted (benchmarks/README.md), so points can be below it.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..captions import Row, number
from ..redraw import redraw
from .bars import FAINT, INK, OURS
from .contender import LIMITS
from .modes import label_of
from .table import caption, title

MARKERS = {"none": "o", "absolute": "s", "gradnorm": "^", "adaptive_cosine": "D", "decoupled": "v"}
THEIRS = "#8a9099"
LABEL_INCHES = 0.2


def draw(rows: list[Row], path: Path) -> None:
    """Draw each contender as a point, bytes to move against time, and the line of the copy; ours in color.

    Raises ValueError if no copy was measured.
    """
    copy = next((row for row in rows if row["contender"] == "copy"), None)
    if copy is None:
        raise ValueError("a roofline needs the row of a copy, and the tiny list has none")
    points = sorted((row for row in rows if row["contender"] not in LIMITS), key=_ns_per_param)
    bytes_moved = [row["bytes_per_param"] for row in points]
    left, right = 0.9 * min(bytes_moved), 1.1 * max(bytes_moved)
    ns_per_byte = 1 / copy["gb_per_s"]
    low = 0.8 * min(left * ns_per_byte, _ns_per_param(points[0]))
    high = 1.25 * max(right * ns_per_byte, _ns_per_param(points[-1]))
    height = max(6.5, 1.7 + LABEL_INCHES * len(points))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12.5, height))
        axes = figure.add_axes((0.06, 0.85 / height, 0.44, 1 - 1.5 / height))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        axes.plot([left, right], [left * ns_per_byte, right * ns_per_byte], color=INK, linewidth=1.2, zorder=2)
        axes.fill_between([left, right], [left * ns_per_byte, right * ns_per_byte], low, color="#f3f4f5", zorder=0)
        for row in points:
            axes.plot(
                row["bytes_per_param"],
                _ns_per_param(row),
                MARKERS[row["scaling"]],
                color=OURS if row["ours"] else THEIRS,
                markersize=7 if row["ours"] else 6,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=4 if row["ours"] else 3,
            )
        _labels(axes, points, LABEL_INCHES / (height - 1.5))
        _legend(axes, points, f"a copy: {number(copy['gb_per_s'])} GB/s")
        axes.set_xlabel("bytes that the step must move, per parameter")
        axes.set_ylabel("time per parameter, ns")
        axes.set_xticks(sorted({round(moved) for moved in bytes_moved}))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:.1g}" if f"{y:.0e}"[0] in "25" else "")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color="#e6e6e6", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        above = {"fontsize": 10, "fontweight": "bold", "va": "top"}
        figure.text(0.01, 1 - 0.1 / height, textwrap.fill(title(rows[0]), 115), **above)
        figure.text(0.01, 0.1 / height, textwrap.fill(caption(rows[0]), 160), fontsize=7, color=FAINT)
        figure.savefig(path, dpi=150)


def _labels(axes: Axes, points: list[Row], gap: float) -> None:
    """Write the names in a column beside the axes, in the order of the points, each with a line to its point."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((row["bytes_per_param"], _ns_per_param(row)))[1]) for row in points]
    for row, height in zip(points, spread_out(heights, gap), strict=True):
        axes.annotate(
            _label(row),
            (row["bytes_per_param"], _ns_per_param(row)),
            (1.06, height),
            textcoords=axes.transAxes,
            va="center",
            fontsize=8,
            color=OURS if row["ours"] else INK,
            fontweight="bold" if row["ours"] else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": OURS if row["ours"] else THEIRS,
                "alpha": 0.35,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
            annotation_clip=False,
            zorder=1,
        )


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Move the ascending `heights` as little as possible so that each is `gap` above the previous one, within 0 to 1.

    Colliding neighbours form a block around the mean of their wanted heights. The gap shrinks if there is no room.
    """
    if not heights:
        return []
    gap = min(gap, 1 / len(heights))
    blocks: list[tuple[list[float], float]] = []  # the wanted heights of a block, and its lowest height
    for height in heights:
        block = [height]
        while True:
            lowest = sum(h - i * gap for i, h in enumerate(block)) / len(block)
            lowest = min(max(lowest, gap / 2), 1 - gap / 2 - (len(block) - 1) * gap)
            if not blocks or blocks[-1][1] + len(blocks[-1][0]) * gap <= lowest:
                break
            block = blocks.pop()[0] + block
        blocks.append((block, lowest))
    return [lowest + i * gap for block, lowest in blocks for i in range(len(block))]


def _legend(axes: Axes, points: list[Row], copy: str) -> None:
    handles = [
        axes.plot([], [], marker, color=THEIRS, label="no prior" if scaling == "none" else scaling)[0]
        for scaling, marker in MARKERS.items()
        if any(row["scaling"] == scaling for row in points)
    ]
    handles += axes.plot([], [], color=INK, linewidth=1.2, label=copy)
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=8)


def _ns_per_param(row: Row) -> float:
    return row["ms"]["median"] * 1e6 / row["params"]


def _label(row: Row) -> str:
    parts = [row["label"]]
    if row["ours"]:
        parts.append(label_of(row))
    if row["scaling"] != "none":
        parts.append(row["scaling"])
    if row.get("clip"):
        parts.append("clipping")
    return f"{', '.join(parts)}: {row['percent_of_copy']:.0f}% of the copy"


def main(argv: list[str] | None = None) -> None:
    redraw("benchmarks.step.roofline", draw, argv)


if __name__ == "__main__":
    main()
