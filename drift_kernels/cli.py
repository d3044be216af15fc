"""drift-prior: build a prior from two checkpoints, look at it, and check that it fits a model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import CheckpointError, PriorError
from .prior import Prior, build_prior
from .prior.build import open_checkpoint
from .prior.live import live_parameters
from .prior.names import MODULES, layer_of, module_of, parse_layers, select_names
from .prior.summary import group_deltas

Result = TypeVar("Result")

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 when it failed or found a prior that does not fit; usage errors exit with 2."""
    arguments = _parser().parse_args(argv)
    errors = Console(stderr=True)
    handler = RichHandler(console=errors, show_time=False, show_path=False, markup=False, highlighter=None)
    logging.getLogger("drift_kernels").addHandler(handler)
    try:
        status: int = arguments.run(arguments, errors)
    except BrokenPipeError:  # the reader of our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, PriorError, OSError) as error:
        errors.print(f"drift-prior: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    finally:
        logging.getLogger("drift_kernels").removeHandler(handler)
    return status


def _build(arguments: argparse.Namespace, errors: Console) -> int:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("building", total=None)
        prior = build_prior(
            arguments.expert,
            arguments.base,
            arguments.out,
            reference=arguments.reference,
            modules=arguments.modules,
            layers=arguments.layers,
            dtype=_DTYPES[arguments.dtype],
            name_map=dict(arguments.name_map),
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{arguments.out}: {len(prior)} deltas, {prior.numel:,} elements, fingerprint {prior.fingerprint[:12]}")
    return 0


def _inspect(arguments: argparse.Namespace, errors: Console) -> int:
    prior = Prior.open(arguments.prior)
    sources = ", ".join(f"{role} {source['name']}" for role, source in prior.record["sources"].items())
    print(f"{prior.record['delta']}: {sources}")
    print(
        f"{len(prior)} deltas, {prior.numel:,} elements, {prior.record['dtype']}, fingerprint {prior.fingerprint[:12]}"
    )
    for warning in prior.record["warnings"]:
        print(f"warning: {warning}")
    groups = group_deltas(prior, lambda name: (layer_of(name), module_of(name)))
    quantised = any(group.stored_cosine is not None for group in groups.values())
    table = Table("layer", "module", show_edge=False, pad_edge=False)
    for title in ("tensors", "norm(delta)", "norm(W)", "ratio", "cosine", *(["worst\nstored"] if quantised else [])):
        table.add_column(title, justify="right")
    previous: int | None = -1
    for (layer, module), group in groups.items():
        if layer != previous:
            table.add_section()
        table.add_row(
            "" if layer is None or layer == previous else str(layer),
            module,
            str(group.tensors),
            f"{group.delta_norm:.4g}",
            f"{group.param_norm:.4g}",
            _number(group.ratio, ".4f"),
            _number(group.cosine, ".6f"),
            *([_number(group.stored_cosine, ".6f")] if quantised else []),
        )
        previous = layer
    Console().print(table)
    if quantised:
        print("worst stored: the smallest cosine of a delta as stored and the exact one")
    if arguments.plot:
        from .prior.plot import plot_prior

        plot_prior(prior, arguments.plot)
        print(f"drawn to {arguments.plot}")
    return 0


def _check(arguments: argparse.Namespace, errors: Console) -> int:
    prior = Prior.open(arguments.prior)
    with open_checkpoint(arguments.model) as checkpoint:
        parameters, whose_names = live_parameters(checkpoint)
    coverage = prior.coverage(parameters)
    print(f"{coverage.summary()}\n{whose_names}")
    return 0 if coverage.complete else 1


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drift-prior", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build a prior: expert - base, or expert - reference")
    for role in ("expert", "base"):
        build.add_argument(f"--{role}", required=True, metavar="DIR", help="a checkpoint's folder, or a Hub id")
    build.add_argument("--reference", metavar="DIR", help="subtract this checkpoint instead of the base")
    build.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    build.add_argument("--overwrite", action="store_true", help="replace the prior that is there")
    build.add_argument(
        "--modules",
        type=_modules,
        default=["attn", "mlp"],
        help=f"some of {','.join(MODULES)}, and last re:REGEX over canonical names (default: attn,mlp)",
    )
    build.add_argument("--layers", type=_layers, help="layers of the base, such as 0-27 or 0-3,8 (default: all)")
    build.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="bf16",
        help="how deltas are stored; int8 and fp8 take half the memory of bf16 (default: bf16)",
    )
    build.add_argument(
        "--name-map",
        type=_name_rule,
        action="append",
        default=[],
        metavar="PREFIX=CANONICAL",
        help="a rule for names that the table does not know, such as transformer.h.=layers.; may be repeated",
    )
    build.set_defaults(run=_build)

    inspect = commands.add_parser("inspect", help="norms, ratios and cosines per layer and module")
    inspect.add_argument("prior", metavar="PRIOR", help="a prior's folder, or a Hub id")
    inspect.add_argument("--plot", metavar="FILE.png", help="draw the ratios and cosines")
    inspect.set_defaults(run=_inspect)

    check = commands.add_parser("check", help="does a prior fit a model? reads names and shapes only")
    check.add_argument("prior", metavar="PRIOR", help="a prior's folder, or a Hub id")
    check.add_argument("--model", required=True, metavar="DIR", help="a checkpoint's folder, or a Hub id")
    check.set_defaults(run=_check)
    return parser


def _modules(text: str) -> list[str]:
    """A regular expression may hold commas, so `re:` takes all that follows."""
    presets, marker, pattern = text.partition("re:")
    modules = [module for module in presets.split(",") if module] + ([marker + pattern] if marker else [])
    _checked(select_names, (), modules)
    return modules


def _layers(text: str) -> frozenset[int]:
    return _checked(parse_layers, text)


def _name_rule(text: str) -> tuple[str, str]:
    prefix, equals, canonical = text.partition("=")
    if not prefix or not equals:
        raise argparse.ArgumentTypeError(f"expected PREFIX=CANONICAL, got {text!r}")
    return prefix, canonical


def _checked(function: Callable[..., Result], *values: object) -> Result:
    """Call `function` and let argparse report its ValueError with its own words."""
    try:
        return function(*values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
