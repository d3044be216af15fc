"""drift-prior check."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from ..prior import Coverage, Prior, Verification
from ..prior.in_memory import live_parameters
from ..prior.opening import open_checkpoint
from .arguments import CHECKPOINT, PRIOR, Commands, add_command
from .output import print_json, progress_bar


def add(commands: Commands) -> None:
    check = add_command(commands, "check", "test whether a prior fits a model, and whether its files are intact", _run)
    check.add_argument("prior", metavar="PRIOR", help=PRIOR)
    check.add_argument(
        "--model", metavar="CHECKPOINT", help=f"compare with the names and shapes of this model: {CHECKPOINT}"
    )
    check.add_argument("--verify", action="store_true", help="read the whole prior and verify its checksums")
    check.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    if not (arguments.model or arguments.verify):
        arguments.misuse("check needs --model, --verify or both")
    prior = Prior.open(arguments.prior)
    coverage, whose_names = _coverage(prior, arguments.model) if arguments.model else (None, None)
    verification = _verify(prior, errors) if arguments.verify else None
    if arguments.json:
        found = _checked_json(coverage, whose_names, verification)
        print_json({"fingerprint": prior.fingerprint, **found})
    else:
        said = [coverage.summary(), whose_names] if coverage and whose_names else []
        print("\n".join(said + ([verification.summary()] if verification else [])))
    return 0 if (not coverage or coverage.complete) and (not verification or verification.intact) else 1


def _coverage(prior: Prior, model: str) -> tuple[Coverage, str]:
    """The coverage, and a line that says whose names were compared."""
    with open_checkpoint(model) as checkpoint:
        parameters, whose_names = live_parameters(checkpoint)
    return prior.coverage(parameters), whose_names


def _verify(prior: Prior, errors: Console) -> Verification:
    with progress_bar(errors) as bar:
        task = bar.add_task("verifying", total=None)
        return prior.verify(lambda done, total: bar.update(task, completed=done, total=total))


def _checked_json(
    coverage: Coverage | None, whose_names: str | None, verification: Verification | None
) -> dict[str, Any]:
    return {
        "coverage": coverage and {"complete": coverage.complete, **coverage.names()},
        "names": whose_names,
        "verification": verification and {"intact": verification.intact, **vars(verification)},
    }
