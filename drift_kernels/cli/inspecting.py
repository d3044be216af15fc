"""drift-prior inspect."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..prior import Prior
from ..prior.names import layer_of, module_of
from ..prior.summary import Group, group_deltas
from ..terminal import console, say
from .arguments import PRIOR, Commands, add_command
from .output import print_json


def add(commands: Commands) -> None:
    inspect = add_command(
        commands, "inspect", "print the norms, ratios and cosines of a prior per layer and module", _run
    )
    inspect.add_argument("prior", metavar="PRIOR", help=PRIOR)
    inspect.add_argument("--plot", metavar="FILE.png", help="plot the ratios and cosines to this file")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    prior = Prior.open(arguments.prior)
    groups = group_deltas(prior, lambda name: (layer_of(name), module_of(name)))
    if arguments.json:
        print_json(_described(prior, groups))
    else:
        _print_groups(prior, groups)
    if arguments.plot:
        from ..prior.plot import plot_prior

        plot_prior(prior, arguments.plot)
        say(errors, f"plot written to {arguments.plot}")
    return 0


def _print_groups(prior: Prior, groups: Mapping[tuple[int | None, str], Group]) -> None:
    sources = ", ".join(f"{role} {source['name']}" for role, source in prior.record["sources"].items())
    print(f"{prior.record['delta']}: {sources}")
    whole = _whole(prior)
    rank = "" if whole.rank is None else f", matrices of rank {whole.rank}"
    print(
        f"{len(prior)} deltas, {prior.numel:,} elements, {prior.record['dtype']}{rank}, "
        f"fingerprint {prior.fingerprint[:12]}"
    )
    for warning in prior.record["warnings"]:
        print(f"warning: {warning}")
    low_rank = whole.kept_energy is not None
    quantised = not low_rank and whole.stored_cosine is not None
    table = Table(show_edge=False, pad_edge=False)
    for title in ("layer", "module"):
        table.add_column(title, overflow="fold")
    titles = ("tensors", "norm(delta)", "norm(W)", "ratio", "cosine")
    for title in (*titles, *_shown(quantised, "worst\nstored"), *_shown(low_rank, "energy\nkept")):
        table.add_column(title, justify="right", overflow="fold")
    previous: int | None = -1
    for (layer, module), group in groups.items():
        if layer != previous:
            table.add_section()
        table.add_row(
            "" if layer is None or layer == previous else str(layer),
            module,
            str(group.tensors),
            f"{group.delta_norm:.4g}",
            _number(group.param_norm, ".4g"),
            _number(group.ratio, ".4f"),
            _number(group.cosine, ".6f"),
            *_shown(quantised, _number(group.stored_cosine, ".6f")),
            *_shown(low_rank, _number(group.kept_energy, ".2%")),
        )
        previous = layer
    console().print(table)
    if low_rank:
        print(f"energy kept: 1 - norm(exact - stored)^2/norm(exact)^2; over all deltas {whole.kept_energy:.2%}")
    if quantised:
        print("worst stored: the smallest cosine between a stored delta and the exact one")


def _whole(prior: Prior) -> Group:
    return group_deltas(prior, lambda name: "whole")["whole"]


def _shown(condition: bool, *cells: str) -> tuple[str, ...]:
    return cells if condition else ()


def _described(prior: Prior, groups: Mapping[tuple[int | None, str], Group]) -> dict[str, Any]:
    """What inspect shows, for --json."""
    whole = _whole(prior)
    return {
        "fingerprint": prior.fingerprint,
        "delta": prior.record["delta"],
        "sources": {role: source["name"] for role, source in prior.record["sources"].items()},
        "dtype": prior.record["dtype"],
        "rank": whole.rank,
        "kept_energy": whole.kept_energy,
        "deltas": len(prior),
        "elements": prior.numel,
        "warnings": prior.record["warnings"],
        "groups": [{"layer": layer, "module": module, **vars(group)} for (layer, module), group in groups.items()],
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
