"""Plots saved rows: the command line shared by the plotting modules."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from .captions import Row


def redraw(module: str, draw: Callable[[list[Row], Path], None], argv: list[str] | None) -> None:
    """Run `python -m module ROWS.json PLOT.png`; the module is in the folder of the benchmark that wrote the rows."""
    benchmark = module.rpartition(".")[0]
    parser = argparse.ArgumentParser(f"python -m {module}", description=f"Plots the results of {benchmark}.")
    parser.add_argument("rows", type=Path, help=f"the rows that {benchmark} wrote with --json")
    parser.add_argument("plot", type=Path, help="the image to write")
    args = parser.parse_args(argv)
    draw(json.loads(args.rows.read_text()), args.plot)
