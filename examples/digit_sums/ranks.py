"""What is left of the prior's use when its deltas are of low rank: prints the table, and writes ranks.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import report
from .__main__ import parse_arguments
from .parallel import run_seeds
from .settings import ARMS, Arm, Settings

RANKS = (4, 8, 16, 32, None)
NAMES = {"adaptive_cosine, anchor": "weights", "LoRA along prior, anchor": "adapters"}  # arms, and what they train


def main() -> None:
    arguments = parse_arguments("python -m examples.digit_sums.ranks", __doc__, Path("runs/digit_sums_ranks"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, settings = Console(), Settings()
    by_name = {arm.name: arm for arm in ARMS}
    arms = [ranked(by_name[name], rank) for name in NAMES for rank in RANKS]
    records = run_seeds(range(arguments.seeds), settings, arms, arguments.out, console)
    summary = report.summarize(records, arms)
    console.print(table(records, summary["arms"]))
    report.write_json(arguments.out / "ranks.json", settings, arms, records, summary)


def ranked(arm: Arm, rank: int | None) -> Arm:
    return replace(arm, name=f"{arm.name}, rank {rank or 'full'}", prior_rank=rank)


def table(records: Sequence[report.Record], scores: dict[str, dict[str, report.Spread]]) -> Table:
    """Held-out sums and readings by rank."""
    result = Table(title=f"By rank of the prior, % (mean ± standard deviation over {len(records)} seeds)")
    for heading in (
        "rank",
        "energy kept",
        *(f"{trained}:\n{score}" for trained in NAMES.values() for score in ("held-out", "reading")),
    ):
        result.add_column(heading, justify="right")
    for rank in RANKS:
        kept = report.spread([1.0 if rank is None else record["kept_energy"][rank] for record in records])
        found = [scores[f"{name}, rank {rank or 'full'}"] for name in NAMES]
        cells = [report.percent(score[key]) for score in found for key in ("held_out_sums", "reading")]
        result.add_row(str(rank or "full"), report.percent(kept), *cells)
    return result


if __name__ == "__main__":
    main()
