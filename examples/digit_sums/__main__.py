"""Runs experiments: prints a table, and writes a JSON file and figures for each."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import peft
import transformers
from rich.console import Console

import drift_kernels
from benchmarks.rows import row_metadata

from . import figures, report
from .analysis import answer
from .experiments import DEMO, EXPERIMENTS
from .parallel import Pool, quiet
from .settings import TUNING_SEEDS, Settings


def main(command: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(command)
    console = Console()
    quiet()
    arguments.out.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (drift_kernels, transformers, peft)}
    try:
        pool = Pool(Settings(), arguments.out, row_metadata() | versions, console)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        for name in arguments.experiment:
            run_experiment(name, arguments.seeds, arguments.out, pool, console)
    except KeyboardInterrupt:
        console.print("Interrupted. Completed runs are kept; run the same command to resume.", highlight=False)
        return 130
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes.", highlight=False)
    return 0


def run_experiment(name: str, n_seeds: int | None, out: Path, pool: Pool, console: Console) -> None:
    experiment = DEMO if name == "demo" else EXPERIMENTS[name]
    result = answer(name, experiment, range(n_seeds or experiment.seeds), pool)
    result["command"] = f"python -m examples.digit_sums --experiment {name}{f' --seeds {n_seeds}' if n_seeds else ''}"
    console.print(report.table(result, experiment.scores))
    if len(result["made_by"]) > 1:
        commits = ", ".join(str(made["commit"]) for made in result["made_by"])
        console.print(f"These runs come from several commits, versions or machines: {commits}.", highlight=False)
    written = [report.write_json(out, result), *figures.draw(out, result, experiment)]
    console.print(f"Written: {', '.join(map(str, written))}\n", highlight=False, soft_wrap=True)


def parse_arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.digit_sums", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--experiment",
        nargs="+",
        choices=("demo", *EXPERIMENTS),
        default=["demo"],
        metavar="NAME",
        help=f"one or more of demo (the default: {DEMO.seeds} seeds, two minutes), {', '.join(EXPERIMENTS)}",
    )
    what.add_argument(
        "--all",
        dest="experiment",
        action="store_const",
        const=list(EXPERIMENTS),
        help="all except the demo",
    )
    parser.add_argument(
        "--seeds", type=seeds, metavar="N", help="number of seeds, starting from 0 (default: 10 or 20, demo: 2)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/digit_sums"),
        metavar="DIR",
        help="output folder; runs completed there are not repeated (default: %(default)s)",
    )
    return parser.parse_args(command)


def seeds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= min(TUNING_SEEDS):
        raise argparse.ArgumentTypeError(f"must be from 1 to {min(TUNING_SEEDS)}, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
