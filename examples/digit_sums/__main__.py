"""Run the experiment: print the table, write results.json, loss.png and trade_off.png."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from . import figures, report
from .parallel import run_seeds
from .settings import ARMS, Settings

SHORT, FULL = 2, 5  # seeds


def main() -> None:
    arguments = parse_arguments("python -m examples.digit_sums", __doc__, Path("runs/digit_sums"))
    console, settings = Console(), Settings()
    arms = [arm for arm in ARMS if arm.in_short or arguments.seeds > SHORT]
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    records = run_seeds(range(arguments.seeds), settings, arms, arguments.out, console)
    seconds = time.monotonic() - started

    summary = report.summarize(records, arms)
    console.print(report.table(summary, arms, arguments.seeds))
    console.print(
        "Held-out sums: of digit pairs that no image example added. Seen sums: of the fine-tuning's pairs.\n"
        "Reading: both digits are named right, whatever follows. "
        f"The text expert adds {report.percent(summary['expert'])} % of its text sums right.",
        highlight=False,
    )
    files = [arguments.out / name for name in ("results.json", "loss.png", "trade_off.png")]
    report.write_json(files[0], settings, arms, records, summary, seconds)
    figures.draw_loss(files[1], records, arms)
    figures.draw_trade_off(files[2], records, arms)
    console.print(f"{seconds / 60:.1f} minutes. Written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def parse_arguments(command: str, what: str | None, out: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=command, description=what)
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--short",
        dest="seeds",
        action="store_const",
        const=SHORT,
        help=f"{SHORT} seeds and fewer arms: a few minutes (the default)",
    )
    seeds.add_argument("--full", dest="seeds", action="store_const", const=FULL, help=f"{FULL} seeds")
    seeds.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"that many seeds, from 0 on; up to {SHORT} with the arms of --short",
    )
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where to write (default: %(default)s)")
    parser.set_defaults(seeds=SHORT)
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
