"""The figures: loss curves, and the trade-off between reasoning and reading."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Record
from .settings import Arm

# Colours of Okabe and Ito, which colour-blind readers can tell apart. An annealed arm is drawn hollow or dashed, one
# with an anchor as a star or dash-dotted, one with adapters as a triangle or dotted: the triangle points down, or to
# the right if they begin along the prior.
_COLOURS = {"gradnorm": "#0072b2", "adaptive_cosine": "#d55e00", "decoupled": "#009e73"}
_MARKERS = {"gradnorm": "o", "adaptive_cosine": "^", "decoupled": "D"}


def draw_loss(path: Path, records: Sequence[Record], arms: Sequence[Arm]) -> None:
    """The training loss of every fine-tuned arm, averaged over the seeds."""
    figure = _figure(width=8.5)
    axes = _axes(figure.add_subplot(), "Training loss of the fine-tuning on image sums", "step", "loss (log scale)")
    for arm in arms:
        if arm.tuned:
            curves = [record["arms"][arm.name]["loss"] for record in records]
            steps = [step for step, _ in curves[0]]
            losses = [statistics.mean(loss for _, loss in points) for points in zip(*curves, strict=True)]
            axes.plot(steps, losses, color=_colour(arm), linestyle=_line(arm), label=arm.name)
    axes.set_yscale("log")
    _save(figure, axes, path)


def draw_trade_off(path: Path, records: Sequence[Record], arms: Sequence[Arm]) -> None:
    """Held-out sums over reading: all arms, and the fine-tuned ones closer. A dot per seed, tied to its arm's mean."""
    figure = _figure(width=12)
    seeds = f"large: mean of {len(records)} seeds, small: each seed" if len(records) > 1 else "one seed"
    figure.suptitle(f"Reasoning against reading on unseen images ({seeds}); better is up and to the right")
    everything, closer = figure.subplots(1, 2)
    tuned = [arm for arm in arms if arm.tuned]
    for axes, shown, title in ((everything, arms, "All arms"), (closer, tuned, "The fine-tuned arms, closer")):
        _axes(axes, title, "right readings, %", "right sums of held-out pairs, %")
        for arm in shown:
            _draw_arm(axes, arm, [record["arms"][arm.name]["scores"] for record in records])
    _save(figure, everything, path)


def _draw_arm(axes: Axes, arm: Arm, scores: Sequence[dict[str, float]]) -> None:
    colour = _colour(arm)
    readings, sums = ([100 * score[key] for score in scores] for key in ("reading", "held_out_sums"))
    x, y = statistics.mean(readings), statistics.mean(sums)
    if len(scores) > 1:
        for reading, right in zip(readings, sums, strict=True):
            axes.plot([x, reading], [y, right], color=colour, linewidth=0.7, alpha=0.35, zorder=2)
        axes.scatter(readings, sums, s=12, color=colour, alpha=0.6, linewidths=0, zorder=2)
    look = {"marker": _marker(arm), "facecolor": "white" if arm.anneal else colour, "edgecolor": colour}
    axes.scatter(x, y, s=90, **look, linewidth=2, label=arm.name, zorder=3)


def _figure(width: float) -> Figure:
    return Figure(figsize=(width, 4.8), dpi=150, layout="constrained")


def _axes(axes: Axes, title: str, x_label: str, y_label: str) -> Axes:
    axes.set_title(title, loc="left")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _save(figure: Figure, legend_of: Axes, path: Path) -> None:
    figure.legend(*legend_of.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path)


def _colour(arm: Arm) -> str:
    if arm.scaling:
        return _COLOURS[arm.scaling]
    return "#999999" if arm.merge else "black"


def _line(arm: Arm) -> str:
    if arm.rank is not None:
        return ":"
    return "-." if arm.anchor else "--" if arm.anneal else "-"


def _marker(arm: Arm) -> str:
    if arm.rank is not None:
        return ">" if arm.along else "v"
    if arm.anchor:
        return "*"
    if arm.scaling:
        return _MARKERS[arm.scaling]
    return "s" if arm.tuned else "X"
