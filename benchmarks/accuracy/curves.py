"""The rows of the accuracy benchmark as curves and points: python -m benchmarks.accuracy.curves ROWS.json PLOT.png"""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..captions import Row, commit
from ..redraw import redraw

# The Okabe-Ito palette, which colour-blind readers can tell apart.
COLOURS = {"float32": "#222222", "bf16 nearest": "#d55e00", "bf16 stochastic": "#0072b2", "bf16 + master": "#009e73"}
RIVAL = "#8a8f98"
FAINT = "#666666"
LINEAR = 0.1  # percent: the axis of the differences is linear below this, logarithmic above


def draw(rows: list[Row], path: Path) -> None:
    """Draw the held-out loss during fine-tuning (left), and each mode's final loss against float32 (right)."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
        curves, ends = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _draw_curves(curves, rows)
        _draw_ends(ends, rows)
        figure.suptitle(textwrap.fill(title(rows[0]), 130), fontsize=10, fontweight="bold", x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(caption(rows[0]), 170), fontsize=7, color=FAINT, x=0.01, ha="left")
        figure.savefig(path)


def _draw_curves(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Held-out loss, mean over the seeds", loc="left", fontsize=9)
    axes.set(xlabel="fine-tuning step", ylabel="nats per byte")
    labelled = set()
    for row in rows:
        reference = row is rows[0]
        steps = [0, *(step for step, _ in row["held_out_curves"][0])]
        points = zip(*row["held_out_curves"], strict=True)
        losses = [mean(row["start_loss"]), *(mean(loss for _, loss in seeds) for seeds in points)]
        # The reference is wide and pale; modes that lose nothing are drawn on top of it.
        look = {"linewidth": 6, "alpha": 0.25} if reference else {"linewidth": 1.5}
        axes.plot(
            steps,
            losses,
            color=_colour(row),
            linestyle="-" if row["ours"] else (0, (2, 2)),
            zorder=1 if reference else 2,
            label=None if row["weights"] in labelled else row["weights"],
            **look,
        )
        labelled.add(row["weights"])
    axes.legend(title="weights (all states)", frameon=False, loc="lower left", alignment="left")
    axes.set_xlim(0)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ends(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Final held-out loss, against float32 with the same seed", loc="left", fontsize=9)
    shown = rows[1:]
    axes.axvline(0, color=COLOURS["float32"], linewidth=1, zorder=1)
    for place, row in enumerate(shown):
        differences, colour = row["difference_percent"], _colour(row)
        middle = mean(differences)
        axes.plot([0, middle], [place, place], color=colour, linewidth=2, alpha=0.5, zorder=2)
        axes.scatter(differences, [place + 0.3] * len(differences), s=10, color=colour, alpha=0.6, linewidths=0)
        axes.scatter(middle, place, s=70, facecolor=colour if row["ours"] else "white", edgecolor=colour, zorder=3)
        axes.annotate(
            f"{middle:+.2f}%",
            (max(*differences, middle, 0), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=1)
    farthest = max(abs(difference) for row in shown for difference in row["difference_percent"])
    least = min(difference for row in shown for difference in row["difference_percent"])
    axes.set_xlim(min(-LINEAR, 2 * least), max(4 * farthest, LINEAR))
    ticks = [tick for tick in (-10, -1, -0.1, 0, 0.1, 1, 10, 100) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:+g}%" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"large: mean, small: each seed; linear below {LINEAR:g}%, logarithmic above")
    axes.set_yticks(range(len(shown)), [f"{row['mode']}\n{row['bytes_per_param']:.1f} bytes/param" for row in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _colour(row: Row) -> str:
    return COLOURS[row["weights"]] if row["ours"] else RIVAL


def title(row: Row) -> str:
    settings, n_seeds = row["settings"], len(row["seeds"])
    return (
        f"Fine-tuning a Qwen2 of {row['params']:,} parameters in every precision mode: "
        f"learning rate {settings['lr']:.0e}, {settings['steps']} steps, {n_seeds} seed{'s' if n_seeds > 1 else ''}"
    )


def caption(row: Row) -> str:
    """Return the device, versions, commit and date."""
    return (
        f"{row['device']}, {row['cores']} cores; torch {row['torch']}, transformers {row['transformers']}, "
        f"Python {row['python']}, text {row['text']}; {commit(row)}; {row['date'][:10]}"
    )


def main(argv: list[str] | None = None) -> None:
    redraw("benchmarks.accuracy.curves", draw, argv)


if __name__ == "__main__":
    main()
