"""What came out, over the seeds: the table and the JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

import drift_kernels

from .settings import Arm, Settings

Record = dict[str, Any]  # of one seed, from SeedRun.run
Spread = dict[str, float | None]

SCORES = {"held_out_sums": "held-out sums", "seen_sums": "seen sums", "reading": "reading"}


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation, which is None for a single value."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def percent(value: Spread) -> str:
    """As "43.8", or "43.8 ± 2.1" over several seeds."""
    mean, std = value["mean"], value["std"]
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:4.1f}"


def summarize(records: Sequence[Record], arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """The spread over the seeds of the expert's text sums, and of each arm's scores."""
    scores = {
        arm.name: {score: spread([record["arms"][arm.name]["scores"][score] for record in records]) for score in SCORES}
        for arm in arms
    }
    return {"expert": spread([record["expert"] for record in records]), "arms": scores}


def table(summary: dict[str, dict[str, Any]], arms: Sequence[Arm], n_seeds: int) -> Table:
    """Each arm's scores in percent, the best mean of each column in bold."""
    over = f"mean ± standard deviation over {n_seeds} seeds" if n_seeds > 1 else "one seed"
    result = Table(title=f"Right answers about unseen images, % ({over})", title_justify="left")
    result.add_column("arm", no_wrap=True)
    result.add_column("alpha", justify="right")
    for heading in SCORES.values():
        result.add_column(heading, justify="right")
    scores = summary["arms"]
    best = {score: max(scores[arm.name][score]["mean"] for arm in arms) for score in SCORES}
    for arm in arms:
        cells = [
            f"[bold]{percent(value)}[/]" if value["mean"] == best[score] else percent(value)
            for score, value in scores[arm.name].items()
        ]
        result.add_row(arm.name, f"{arm.alpha:g}" if arm.scaling else "", *cells)
    return result


def write_json(
    path: Path,
    settings: Settings,
    arms: Sequence[Arm],
    records: Sequence[Record],
    summary: dict[str, dict[str, Any]],
    seconds: float | None = None,
) -> None:
    """Everything that the table and the figures are made of, and what produced it."""
    modules = (drift_kernels, torch, transformers)
    versions = {module.__name__: module.__version__ for module in modules} | {"python": platform.python_version()}
    content = {
        "versions": versions,
        "seconds": None if seconds is None else round(seconds, 1),
        "settings": asdict(settings),
        "arms": [asdict(arm) for arm in arms],
        "summary": summary,
        "seeds": records,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
