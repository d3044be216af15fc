"""The sheet as a plot: for each machine, the range of shares of a copy predicted for every kernel."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ...step.bars import FAINT, INK, OURS, RIVAL
from .entries import Sheet, by_kernel
from .kinds import label
from .machines import LATENCIES, MACHINES
from .printed import bounds, caption

LOW, HIGH = map(str, LATENCIES)
MEASURED = "#c1442d"


def draw(sheet: Sheet, path: Path, shown: list[str], before: Sheet | None, compared: list[dict[str, Any]]) -> None:
    """Draw a panel per machine and a bar per kernel, from its share at the high latency to that at the low one.

    `before`: an earlier sheet, drawn in gray above. `compared`: measurements of steps with a single launch, as points.
    """
    entries = by_kernel(sheet)
    earlier = {} if before is None else by_kernel(before)
    shown = [name for name in shown if any(name == kernel for _, kernel in entries)]
    machines = [machine for machine in MACHINES if any(machine.arch == arch for arch, _ in entries)]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.2 + 2.75 * len(machines), 2.0 + 0.36 * len(shown)), layout="constrained")
        panels = figure.subplots(1, len(machines), sharey=True, squeeze=False)[0]
        for axes, machine in zip(panels, machines, strict=True):
            axes.axvline(100, color=INK, linewidth=1, zorder=1)
            for place, name in enumerate(shown):
                old = earlier.get((machine.arch, name))
                if old is not None and machine.name in old["machines"]:
                    _bar(axes, place - 0.3, old["machines"][machine.name], RIVAL, 0.2)
                one = entries.get((machine.arch, name))
                if one is not None:
                    predicted = one["machines"][machine.name]
                    _bar(axes, place, predicted, OURS, 0.36)
                    axes.text(3, place + 0.38, bounds(predicted), va="center", fontsize=6.5, color=FAINT)
                points = [
                    step["measured_percent"]
                    for step in compared
                    if step["machine"] == machine.name and step["kernels"] == [name]
                ]
                axes.plot(points, [place] * len(points), "D", color=MEASURED, markersize=5, zorder=4)
            axes.set_title(f"{machine.name}, {machine.terabytes:g} TB/s", fontsize=9, loc="left")
            axes.set_xlim(0, 118)
            axes.set_xticks([0, 25, 50, 75, 100])
            axes.set_ylim(len(shown) - 0.3, -0.7)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#e6e6e6", zorder=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
        panels[0].set_yticks(range(len(shown)), [label(name) for name in shown])
        handles: list[Any] = [Patch(color=OURS, label=f"predicted, at {HIGH} to {LOW} ns of latency")]
        handles += [Patch(color=RIVAL, label="predicted before")] if before is not None else []
        handles += [Line2D([], [], marker="D", color=MEASURED, linestyle="", label="measured")] if compared else []
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
        title = "PREDICTED from machine code, without a GPU: bandwidth of each kernel, in percent of a copy"
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
        note = f"{caption(sheet, before)}. Below a bar: its first limit, and the share that it alone allows."
        figure.supxlabel(textwrap.fill(note, 170), fontsize=7, color=FAINT, x=0.01, ha="left")
        figure.savefig(path, dpi=150)


def _bar(axes: Any, place: float, predicted: dict[str, Any], color: str, height: float) -> None:
    low, high = (100 * predicted["share"][ns] for ns in (HIGH, LOW))
    axes.barh(place, high, color=color, alpha=0.35, height=height, zorder=2)
    axes.barh(place, low, color=color, height=height, zorder=3)
    text = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}-{high:.0f}"
    axes.text(high + 1.5, place, text, va="center", fontsize=7, color=INK)
