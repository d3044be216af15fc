"""drift-prior combine."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..prior import combine_priors
from ..prior.merging import METHODS, Recipe
from .arguments import DTYPES, PRIOR, Commands, add_command
from .output import progress_bar


def add(commands: Commands) -> None:
    combine = add_command(commands, "combine", "make one prior of several", _run)
    combine.add_argument("priors", nargs="+", metavar="PRIOR", help=PRIOR)
    combine.add_argument(
        "--weights", required=True, nargs="+", type=float, metavar="W", help="a number for each prior, in their order"
    )
    combine.add_argument(
        "--method",
        choices=METHODS,
        default="linear",
        help="linear: the weighted sum, task arithmetic; ties: deltas trimmed, and only what has the sign of the "
        "weighted sum; dare: elements dropped at random and the others enlarged; dare_ties: both (default: linear)",
    )
    combine.add_argument(
        "--density",
        nargs="+",
        type=float,
        metavar="D",
        help="ties, dare and dare_ties: the share of elements that is kept of each delta; one number, or one for each "
        "prior",
    )
    combine.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide by the sum of the weights, where signs are elected by that of those that take part "
        "(default: with ties only)",
    )
    combine.add_argument("--seed", type=int, default=0, help="of what dare drops (default: 0)")
    combine.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    combine.add_argument("--overwrite", action="store_true", help="replace the prior that is there")
    combine.add_argument("--dtype", choices=DTYPES, default="bf16", help="how deltas are stored (default: bf16)")


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
