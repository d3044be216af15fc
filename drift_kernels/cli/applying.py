"""drift-prior apply."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..prior import apply_prior
from .arguments import CHECKPOINT, PRIOR, Commands, add_command, number
from .output import progress_bar


def add(commands: Commands) -> None:
    apply = add_command(commands, "apply", "add a prior to the weights of a checkpoint (task arithmetic)", _run)
    apply.add_argument("prior", metavar="PRIOR", help=PRIOR)
    apply.add_argument("--base", required=True, metavar="DIR", help=CHECKPOINT)
    apply.add_argument(
        "--scale", type=number, default=1.0, metavar="S", help="the new weights are W + S * delta (default: 1)"
    )
    apply.add_argument("--out", required=True, metavar="DIR", help="folder to write the new checkpoint to")
    apply.add_argument("--overwrite", action="store_true", help="replace a checkpoint that apply wrote there")
    apply.add_argument("--partial", action="store_true", help="skip deltas that have no weight in the base")


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    with progress_bar(errors) as bar:
        task = bar.add_task("applying", total=None)
        coverage = apply_prior(
            arguments.prior,
            arguments.base,
            arguments.out,
            scale=arguments.scale,
            partial=arguments.partial,
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    changed, kept = len(coverage.matched), len(coverage.model_only)
    print(f"{arguments.out}: {changed} tensors are W + {arguments.scale:g} * delta, {kept} are unchanged")
    return 0
