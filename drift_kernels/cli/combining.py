"""drift-prior combine."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..prior import combine_priors
from ..prior.merging import METHODS, Recipe
from .arguments import DTYPES, PRIOR, Commands, add_command
from .output import progress_bar


def add(commands: Commands) -> None:
    combine = add_command(commands, "combine", "merge several priors into one", _run)
    combine.add_argument("priors", nargs="+", metavar="PRIOR", help=PRIOR)
    combine.add_argument(
        "--weights", required=True, nargs="+", type=float, metavar="W", help="one weight per prior, in the same order"
    )
    combine.add_argument(
        "--method",
        choices=METHODS,
        default="linear",
        help="linear: weighted sum (task arithmetic); ties: trim each delta to its largest elements, and keep only "
        "those with the sign of the weighted sum; dare: drop random elements and rescale the others; dare_ties: as "
        "dare, with the signs of ties (default: linear)",
    )
    combine.add_argument(
        "--density",
        nargs="+",
        type=float,
        metavar="D",
        help="for ties, dare and dare_ties: fraction of each delta's elements to keep; one number, or one per prior",
    )
    combine.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide by the sum of the weights; for ties and dare_ties, of the priors that contribute to an element "
        "(default: for ties only)",
    )
    combine.add_argument("--seed", type=int, default=0, help="random seed for dare and dare_ties (default: 0)")
    combine.add_argument("--out", required=True, metavar="DIR", help="folder to write the prior to")
    combine.add_argument("--overwrite", action="store_true", help="replace an existing prior")
    combine.add_argument("--dtype", choices=DTYPES, default="bf16", help="storage format of deltas (default: bf16)")


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    numbers = {name: getattr(arguments, name) for name in ("method", "weights", "density", "normalize", "seed")}
    try:
        Recipe.of(len(arguments.priors), **numbers)
    except ValueError as error:
        arguments.misuse(str(error))
    with progress_bar(errors) as bar:
        task = bar.add_task("combining", total=None)
        prior = combine_priors(
            arguments.priors,
            arguments.out,
            **numbers,
            dtype=DTYPES[arguments.dtype],
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{arguments.out}: {len(prior)} deltas, {prior.numel:,} elements, fingerprint {prior.fingerprint[:12]}")
    return 0
