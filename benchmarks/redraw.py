"""Plots of rows that were kept: the command line of every module that draws."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from .captions import Row


def redraw(module: str, draw: Callable[[list[Row], Path], None], argv: list[str] | None) -> None:
    """`python -m module ROWS.json PLOT.png`, of a module in the folder of the benchmark that wrote the rows."""
    benchmark = module.rpartition(".")[0]
    parser = argparse.ArgumentParser(f"python -m {module}", description=f"Draws what {benchmark} measured.")
    parser.add_argument("rows", type=Path, help=f"what {benchmark} wrote with --json")
    parser.add_argument("plot", type=Path, help="the image to write")
    args = parser.parse_args(argv)
    draw(json.loads(args.rows.read_text()), args.plot)
