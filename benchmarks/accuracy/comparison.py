"""How well each precision mode of FusedDriftAdamW fine-tunes: python -m benchmarks.accuracy

The held-out loss of every mode against float32 weights and states. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..captions import Row, number
from ..rows import row_metadata
from . import curves
from .finetune import MODES, Mode, Record, SeedRun, Settings, text_digest

SEEDS, SHORT_SEEDS = 3, 2
SHORT = {"pretraining_steps": 150, "steps": 50, "evaluate_every": 25}
TABLE_WIDTH = 120


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    console = Console(width=max(TABLE_WIDTH, Console().width))
    settings = replace(Settings(), lr=args.lr, **(SHORT if args.short else {}))
    seeds = range(args.seeds or (SHORT_SEEDS if args.short else SEEDS))
    prepare_process()
    refusals = {mode.name: refusal for mode in MODES if (refusal := mode.refusal())}
    for name, refusal in refusals.items():
        console.print(f"Left out: {name}: {refusal}", markup=False, highlight=False)
    modes = tuple(mode for mode in MODES if mode.name not in refusals)

    metadata = row_metadata()
    started = time.monotonic()
    records = run_seeds(seeds, settings, modes, console)
    common = {"seconds": round(time.monotonic() - started), "transformers": transformers.__version__, **metadata}
    rows = make_rows(records, settings, modes, common)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot is not None:
        curves.draw(rows, args.plot)
    print_table(rows, console)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Fine-tunes a small model in every precision mode and compares the held-out losses.",
    )
    parser.add_argument("--short", action="store_true", help="fewer steps, two seeds: about a minute")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"number of seeds, starting from 0 (default: {SEEDS})")
    parser.add_argument("--lr", type=float, default=Settings().lr, help="learning rate (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the rows to FILE")
    return parser


def run_seeds(seeds: Sequence[int], settings: Settings, modes: tuple[Mode, ...], console: Console) -> list[Record]:
    """Return the records of all seeds, in order. Each seed has a single-threaded process and a progress bar."""
    columns = (TextColumn("{task.fields[seed]}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"))
    spawn = multiprocessing.get_context("spawn")
    with (
        spawn.Manager() as manager,
        ProcessPoolExecutor(len(seeds), spawn, prepare_process) as pool,
        Progress(*columns, console=console) as progress,
    ):
        queue = manager.Queue()
        total = settings.total_steps(len(modes))
        bars = {seed: progress.add_task("starting", total=total, seed=f"seed {seed}") for seed in seeds}
        futures = [pool.submit(_run_seed, seed, settings, modes, queue) for seed in seeds]
        running = set(futures)
        while running:
            done, running = wait(running, timeout=0.2)
            while not queue.empty():
                seed, name = queue.get()
                progress.update(bars[seed], advance=1, description=name)
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
                break
        for seed in seeds:
            progress.update(bars[seed], description="")
        return [future.result() for future in futures]


def prepare_process() -> None:
    """Use one thread, so that results do not depend on the number of cores; hide warnings about the modes tested."""
    torch.set_num_threads(1)
    logging.getLogger("drift_kernels").setLevel(logging.ERROR)


def _run_seed(seed: int, settings: Settings, modes: tuple[Mode, ...], queue: Any) -> Record:
    return SeedRun(seed, settings, lambda name: queue.put((seed, name))).run(modes)


def make_rows(records: list[Record], settings: Settings, modes: tuple[Mode, ...], common: Row) -> list[Row]:
    """Return one row per mode, in the order of `modes`; the first mode is the reference.

    Lists are in the order of the seeds. `difference_percent` compares the held-out loss with the reference's for the
    same seed; `difference_in_spreads` is the mean difference divided by the reference's standard deviation;
    `gain_percent` is the decrease of the loss since the start, in percent of the reference's.
    `rounded_difference_percent` is the difference after rounding the final weights to bfloat16. With one seed, values
    that need a spread are None.
    """
    starts = [record["start_loss"] for record in records]

    def final(mode: Mode) -> list[float]:
        return [record["modes"][mode.name]["held_out"][-1][1] for record in records]

    def percent(losses: list[float]) -> list[float]:
        return [100 * (loss / own - 1) for loss, own in zip(losses, reference, strict=True)]

    reference = final(modes[0])
    deviation = stdev(reference) if len(reference) > 1 else None
    rows: list[Row] = []
    for mode in modes:
        runs, losses = [record["modes"][mode.name] for record in records], final(mode)
        row = {
            "benchmark": "accuracy",
            "mode": mode.name,
            "weights": mode.weights,
            "states": mode.states,
            "ours": mode.ours,
            "bytes_per_param": runs[0]["bytes"] / runs[0]["params"],
            "held_out_loss": losses,
            "difference_percent": percent(losses),
            "difference_in_spreads": (mean(losses) - mean(reference)) / deviation if deviation else None,
            "gain_percent": [
                100 * (start - loss) / (start - own) for start, loss, own in zip(starts, losses, reference, strict=True)
            ],
            "rounded_difference_percent": percent([run["rounded_loss"] for run in runs]),
            "start_loss": starts,
            "held_out_curves": [run["held_out"] for run in runs],
            "training_curves": [run["training"] for run in runs],
            "seeds": [record["seed"] for record in records],
            "params": runs[0]["params"],
            "settings": asdict(settings),
            "text": text_digest(),
        }
        rows.append({**row, **common})
    return rows


def print_table(rows: list[Row], console: Console) -> None:
    """Print the rows, and the reference's loss of accuracy when its final weights are rounded to bfloat16."""
    first = rows[0]
    table = Table(box=box.SIMPLE_HEAD, title=curves.title(first), caption=curves.caption(first))
    table.title_justify = table.caption_justify = "left"
    for column in ("weights", "states"):
        table.add_column(column, no_wrap=True)
    for column in (
        "bytes/\nparam",
        "held-out\nloss",
        "against\nfloat32",
        "in stds of\nfloat32's",
        "gain, of\nfloat32's",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spreads = row["difference_in_spreads"]
        table.add_row(
            row["weights"],
            row["states"],
            f"{row['bytes_per_param']:.2f}",
            spread(row["held_out_loss"], ".4f"),
            "" if row is first else spread(row["difference_percent"], "+.3f", "%"),
            "" if row is first or spreads is None else f"{spreads:+.2f}",
            f"{mean(row['gain_percent']):.1f}%",
        )
    console.print(table)
    rounded = spread(first["rounded_difference_percent"], "+.3f", "%")
    console.print(
        f"Mean ± standard deviation over the seeds. float32's final weights rounded to bf16 once: {rounded}. "
        f"Loss before fine-tuning: {spread(first['start_loss'], '.4f')}. {number(first['seconds'] / 60)} minutes.",
        highlight=False,
    )


def spread(values: list[float], form: str, unit: str = "") -> str:
    """Format as "+0.012%", or "+0.012% ± 0.003%" over several seeds."""
    middle = f"{mean(values):{form}}{unit}"
    return middle if len(values) == 1 else f"{middle} ± {stdev(values):{form.lstrip('+')}}{unit}"
