"""drift-prior init-lora."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from ..prior.init_lora import ModuleFit, init_lora, seen_together
from ..terminal import console
from .arguments import PRIOR, Commands, add_command, modules, rank
from .output import print_json, progress_bar


def add(commands: Commands) -> None:
    init = add_command(commands, "init-lora", "write a PEFT LoRA adapter whose A follows a prior's deltas", _run)
    init.add_argument("prior", metavar="PRIOR", help=PRIOR)
    init.add_argument("--base", required=True, metavar="DIR", help="a folder with a config.json, or a Hub id")
    init.add_argument("--out", required=True, metavar="ADAPTER", help="folder to write the adapter to")
    init.add_argument("--rank", type=rank, default=16, metavar="R", help="rank of the adapter (default: 16)")
    init.add_argument(
        "--alpha", type=float, help="PEFT's lora_alpha (default: the rank, a scaling of 1 without --rslora)"
    )
    init.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(rank) instead of alpha/rank")
    init.add_argument(
        "--modules",
        type=modules,
        default=["attn", "mlp"],
        help="layers with an adapter, as for build (default: attn,mlp)",
    )
    init.add_argument("--overwrite", action="store_true", help="replace an adapter that init-lora wrote there")
    init.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    with progress_bar(errors) as bar:
        task = bar.add_task("initialising", total=None)
        fits = init_lora(
            arguments.prior,
            arguments.base,
            arguments.out,
            rank=arguments.rank,
            alpha=arguments.alpha,
            rslora=arguments.rslora,
            modules=arguments.modules,
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    kinds: dict[str, list[ModuleFit]] = {}
    for name, fit in fits.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(fit)
    if arguments.json:
        found = {
            "modules": {name: asdict(fit) for name, fit in fits.items()},
            "kinds": {kind: seen_together(members) for kind, members in kinds.items()},
            "seen": seen_together(list(fits.values())),
        }
        print_json({"rank": arguments.rank, **found})
        return 0
    _print_table("module", {name: [fit] for name, fit in fits.items()})
    _print_table("kind", kinds)
    seen = _share(seen_together(list(fits.values())))
    print(f"{arguments.out}: {len(fits)} modules of rank {arguments.rank} capture {seen} of their deltas' norm^2")
    return 0


def _print_table(title: str, rows: Mapping[str, list[ModuleFit]]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(title, overflow="fold")
    for column in ("norm^2 captured", "by a random A"):
        table.add_column(column, justify="right")
    for name, fits in rows.items():
        total = sum(fit.delta_norm**2 for fit in fits)
        random = sum(fit.random * fit.delta_norm**2 for fit in fits) / total if total else fits[0].random
        table.add_row(name, _share(seen_together(fits)), _share(random))
    console().print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
