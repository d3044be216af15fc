"""Draws the figures from results, as PNG for pages and PDF for print. As a script, redraws those of results/."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .analysis import SCORES, Result, front
from .experiments import DEMO, EXPERIMENTS, Experiment

Drawn = dict[str, Any]  # an entry of a result

# The Okabe-Ito palette, which colour-blind readers can tell apart. Hollow: annealed. Star: anchor. Triangle: LoRA.
_COLOURS = {"absolute": "#cc79a7", "gradnorm": "#0072b2", "adaptive_cosine": "#d55e00", "decoupled": "#009e73"}
_STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "pdf.fonttype": 42, "axes.axisbelow": True}


def draw(out: Path, result: Result, experiment: Experiment) -> list[Path]:
    """Write `NAME-dots.png`, `NAME-dots.pdf` and so on, for each kind of figure of the experiment; return the paths."""
    written = []
    for kind in experiment.figures:
        with rc_context(_STYLE):
            figure = _KINDS[kind](result, experiment)
            for ending in ("png", "pdf"):
                path = out / f"{result['experiment']}-{kind}.{ending}"
                figure.savefig(path, dpi=160, metadata={"CreationDate": None} if ending == "pdf" else None)
                written.append(path)
    return written


def _dots(result: Result, experiment: Experiment) -> Figure:
    """Draw a row per entry that is not on a line and a panel per score: mean, interval, and a dot per seed."""
    entries = [entry for entry in result["entries"] if entry["x"] is None][::-1]
    figure, panels = _figure(
        experiment, height=1.1 + 0.24 * len(entries), width=4.5 + 2 * len(experiment.scores), share=True
    )
    for axes, score in zip(panels, experiment.scores, strict=True):
        _look(axes, f"{SCORES[score]}, %", "")
        for row, entry in enumerate(entries):
            seeds = [100 * value for value in entry["scores"][score]["seeds"]]
            axes.scatter(seeds, [row] * len(seeds), s=7, color=_colour(entry), alpha=0.35, linewidths=0)
            _point(axes, entry, x=entry["scores"][score], y=row)
        axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    return figure


def _lines(result: Result, experiment: Experiment) -> Figure:
    """Draw scores over x, with their intervals. Entries without x are horizontal lines."""
    figure, panels = _figure(experiment, height=3.4, width=3.3 + 3.2 * len(experiment.scores))
    lines = list(dict.fromkeys(entry["line"] for entry in result["entries"]))
    for axes, score in zip(panels, experiment.scores, strict=True):
        _look(axes, experiment.x_label, f"{SCORES[score]}, %")
        for line in lines:
            entries = [entry for entry in result["entries"] if entry["line"] == line]
            first = entries[0]
            if first["x"] is None:
                mean = 100 * first["scores"][score]["mean"]
                axes.axhline(mean, color=_colour(first), linestyle=_dash(first), linewidth=1, alpha=0.8, label=line)
                continue
            entries.sort(key=lambda entry: entry["x"])
            xs, means = [entry["x"] for entry in entries], [100 * entry["scores"][score]["mean"] for entry in entries]
            axes.plot(
                xs, means, color=_colour(first), linestyle=_dash(first), linewidth=1.2, label=line, **_marker(first)
            )
            _band(axes, xs, [entry["scores"][score] for entry in entries], _colour(first))
        if "log" in experiment.x_label:
            axes.set_xscale("log", base=2)
            places = sorted({entry["x"] for entry in result["entries"] if entry["x"] is not None})
            axes.set_xticks(places, [f"{x:g}" for x in places], fontsize=7)
            axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _front(result: Result, experiment: Experiment) -> Figure:
    """Draw held-out sums over readings: all entries, and a close-up of the best. A line joins the Pareto-optimal
    ones."""
    figure, (everything, closer) = _figure(experiment, height=4.6, width=11.5, panels=2)
    places = {
        entry["name"]: (entry["scores"]["reading"]["mean"], entry["scores"]["held_out_sums"]["mean"])
        for entry in result["entries"]
    }
    best = sorted((places[name] for name in front(places)), key=lambda place: place[0])
    for axes in (everything, closer):
        _look(axes, "reading, %", "held-out sums, %")
        axes.plot([100 * x for x, _ in best], [100 * y for _, y in best], color="#bbbbbb", linewidth=1.2, zorder=1)
        for entry in result["entries"]:
            _point(axes, entry, x=entry["scores"]["reading"], y=entry["scores"]["held_out_sums"], label=entry["name"])
    everything.set_title("all", loc="left")
    closer.set_title("closer", loc="left")
    middle = float(numpy.median([x for x, _ in places.values()]))
    closer.set_xlim(100 * middle - 4, 100 * max(x for x, _ in places.values()) + 1)
    figure.legend(*everything.get_legend_handles_labels(), loc="outside right center", frameon=False, ncols=1)
    return figure


def _loss(result: Result, experiment: Experiment) -> Figure:
    """Draw the training loss of each fine-tuned entry; thick lines have an anchor."""
    figure, (axes,) = _figure(experiment, height=3.6, width=8, panels=1)
    _look(axes, "step", "loss of the fine-tuning (log scale)")
    for entry in (entry for entry in result["entries"] if entry["loss"]):
        steps, losses = zip(*entry["loss"], strict=True)
        look = {"color": _colour(entry), "linestyle": _dash(entry), "linewidth": 2.4 if entry["arm"]["anchor"] else 1.1}
        axes.plot(steps, losses, **look, label=entry["name"])
    axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


_KINDS: dict[str, Callable[[Result, Experiment], Figure]] = {
    "dots": _dots,
    "lines": _lines,
    "front": _front,
    "loss": _loss,
}


def _figure(
    experiment: Experiment, height: float, width: float, panels: int | None = None, share: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(experiment.question, fontsize=10, x=0.01, ha="left")
    count = panels or len(experiment.scores)
    return figure, figure.subplots(1, count, sharey=share, squeeze=False)[0]


def _look(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.6)


def _point(axes: Axes, entry: Drawn, x: Any, y: Any, label: str | None = None) -> None:
    """Draw a mean with its interval in each direction that has one."""
    (at, across), (up, along) = _bar(x), _bar(y)
    axes.errorbar(
        at, up, xerr=across, yerr=along, color=_colour(entry), linewidth=1, capsize=0, label=label, **_marker(entry)
    )


def _bar(value: Any) -> tuple[float, list[list[float]] | None]:
    if not isinstance(value, dict):
        return float(value), None
    mean = 100 * value["mean"]
    if value["low"] is None:
        return mean, None
    return mean, [[mean - 100 * value["low"]], [100 * value["high"] - mean]]


def _band(axes: Axes, xs: Sequence[float], values: Sequence[dict[str, Any]], colour: str) -> None:
    if values[0]["low"] is not None:
        low, high = ([100 * value[end] for value in values] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)


def _colour(entry: Drawn) -> str:
    arm = entry["arm"]
    if arm["random"]:
        return "#e69f00"
    if arm["scaling"]:
        return _COLOURS[arm["scaling"]]
    return {"task": "#888888", "ties": "#56b4e9", "way": "#b8a000"}[arm["vector"]] if arm["merge"] else "black"


def _dash(entry: Drawn) -> str:
    arm = entry["arm"]
    if arm["modules"] != "default":
        return {"attn": "--", "mlp": ":"}[arm["modules"]]
    if arm["rank"] is not None:
        return ":"
    return "-." if arm["anchor"] else "--" if arm["anneal"] else "-"


def _marker(entry: Drawn) -> dict[str, Any]:
    arm = entry["arm"]
    shape, size = "o", 5.5
    if arm["rank"] is not None:
        shape = ">" if arm["along"] else "v"
    elif arm["anchor"]:
        shape, size = "*", 9
    elif not arm["tuned"]:
        shape = "X"
    elif not arm["scaling"]:
        shape = "s"
    hollow = arm["anneal"] is not None
    return {"marker": shape, "markersize": size, "markerfacecolor": "white" if hollow else _colour(entry)}


def main() -> None:
    folder = Path(__file__).parent / "results"
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        draw(folder, result, {"demo": DEMO, **EXPERIMENTS}[result["experiment"]])


if __name__ == "__main__":
    main()
