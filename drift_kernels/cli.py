"""drift-prior: build a prior from two checkpoints, look at it, and check that it fits a model."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import CheckpointError, PriorError
from .prior import Coverage, Prior, Verification, build_prior
from .prior.build import open_checkpoint
from .prior.in_memory import live_parameters
from .prior.names import PRESETS, layer_of, module_of, parse_layers, select_names
from .prior.summary import Group, group_deltas
from .terminal import LogLines, Stopped, console, say, stoppable

Result = TypeVar("Result")

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


_EXIT_STATUS = (
    "Exit status: 0 when all is well; 1 when it failed, or found a prior that does not fit or is damaged; 2 for a "
    "wrong command line; 129, 130 or 143 when SIGHUP, Ctrl-C or SIGTERM stopped it. Errors and warnings go to stderr."
)


_CHECKPOINT = "a checkpoint's folder, or a Hub id: org/name or org/name@revision"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status (`--help` lists them); usage errors exit with 2.

    Without `argv` it takes the process's own, and the process is expected to end with it; likewise when a signal has
    stopped it.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is _check and not (arguments.model or arguments.verify):
        parser.error("check needs --model, --verify or both")
    errors = console(stderr=True)
    handler = LogLines(errors)
    logging.getLogger("drift_kernels").addHandler(handler)
    try:
        with stoppable(to_the_end=argv is None):
            status: int = arguments.run(arguments, errors)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, PriorError, OSError, ImportError) as error:
        say(errors, str(error), style="red")
        return 1
    except Stopped as stopped:
        say(errors, str(stopped))
        return stopped.status
    finally:
        logging.getLogger("drift_kernels").removeHandler(handler)
    return status


def _progress(errors: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def _build(arguments: argparse.Namespace, errors: Console) -> int:
    with _progress(errors) as bar:
        task = bar.add_task("building", total=None)
        prior = build_prior(
            arguments.expert,
            arguments.base,
            arguments.out,
            reference=arguments.reference,
            modules=arguments.modules,
            layers=arguments.layers,
            include_bias=arguments.include_bias,
            dtype=_DTYPES[arguments.dtype],
            name_map=dict(arguments.name_map),
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{arguments.out}: {len(prior)} deltas, {prior.numel:,} elements, fingerprint {prior.fingerprint[:12]}")
    return 0


def _inspect(arguments: argparse.Namespace, errors: Console) -> int:
    prior = Prior.open(arguments.prior)
    groups = group_deltas(prior, lambda name: (layer_of(name), module_of(name)))
    if arguments.json:
        _print_json(_described(prior, groups))
    else:
        _print_groups(prior, groups)
    if arguments.plot:
        from .prior.plot import plot_prior

        plot_prior(prior, arguments.plot)
        say(errors, f"drawn to {arguments.plot}")
    return 0


def _print_groups(prior: Prior, groups: Mapping[tuple[int | None, str], Group]) -> None:
    sources = ", ".join(f"{role} {source['name']}" for role, source in prior.record["sources"].items())
    print(f"{prior.record['delta']}: {sources}")
    print(
        f"{len(prior)} deltas, {prior.numel:,} elements, {prior.record['dtype']}, fingerprint {prior.fingerprint[:12]}"
    )
    for warning in prior.record["warnings"]:
        print(f"warning: {warning}")
    quantised = any(group.stored_cosine is not None for group in groups.values())
    table = Table(show_edge=False, pad_edge=False)
    for title in ("layer", "module"):
        table.add_column(title, overflow="fold")
    for title in ("tensors", "norm(delta)", "norm(W)", "ratio", "cosine", *(["worst\nstored"] if quantised else [])):
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
            f"{group.param_norm:.4g}",
            _number(group.ratio, ".4f"),
            _number(group.cosine, ".6f"),
            *([_number(group.stored_cosine, ".6f")] if quantised else []),
        )
        previous = layer
    console().print(table)
    if quantised:
        print("worst stored: the smallest cosine of a delta as stored and the exact one")


def _described(prior: Prior, groups: Mapping[tuple[int | None, str], Group]) -> dict[str, Any]:
    """What inspect shows, for --json."""
    return {
        "fingerprint": prior.fingerprint,
        "delta": prior.record["delta"],
        "sources": {role: source["name"] for role, source in prior.record["sources"].items()},
        "dtype": prior.record["dtype"],
        "deltas": len(prior),
        "elements": prior.numel,
        "warnings": prior.record["warnings"],
        "groups": [{"layer": layer, "module": module, **vars(group)} for (layer, module), group in groups.items()],
    }


def _check(arguments: argparse.Namespace, errors: Console) -> int:
    prior = Prior.open(arguments.prior)
    coverage, whose_names = _coverage(prior, arguments.model) if arguments.model else (None, None)
    verification = _verify(prior, errors) if arguments.verify else None
    if arguments.json:
        found = _checked_json(coverage, whose_names, verification)
        _print_json({"fingerprint": prior.fingerprint, **found})
    else:
        said = [coverage.summary(), whose_names] if coverage and whose_names else []
        print("\n".join(said + ([verification.summary()] if verification else [])))
    return 0 if (not coverage or coverage.complete) and (not verification or verification.intact) else 1


def _coverage(prior: Prior, model: str) -> tuple[Coverage, str]:
    """And a line that says whose names were compared."""
    with open_checkpoint(model) as checkpoint:
        parameters, whose_names = live_parameters(checkpoint)
    return prior.coverage(parameters), whose_names


def _verify(prior: Prior, errors: Console) -> Verification:
    with _progress(errors) as bar:
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


def _print_json(content: Mapping[str, Any]) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drift-prior", description=__doc__, epilog=_EXIT_STATUS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = _command(commands, "build", "build a prior: expert - base, or expert - reference", _build)
    for role in ("expert", "base"):
        build.add_argument(f"--{role}", required=True, metavar="DIR", help=_CHECKPOINT)
    build.add_argument("--reference", metavar="DIR", help="subtract this checkpoint instead of the base")
    build.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    build.add_argument("--overwrite", action="store_true", help="replace the prior that is there")
    build.add_argument(
        "--modules",
        type=_modules,
        default=["attn", "mlp"],
        help=f"some of {','.join(PRESETS)}, and last re:REGEX over canonical names, or several, each with its re: "
        "(default: attn,mlp)",
    )
    build.add_argument("--no-bias", dest="include_bias", action="store_false", help="leave biases out")
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

    inspect = _command(commands, "inspect", "norms, ratios and cosines per layer and module", _inspect)
    inspect.add_argument("prior", metavar="PRIOR", help="a prior's folder, or a Hub id")
    inspect.add_argument("--plot", metavar="FILE.png", help="draw the ratios and cosines")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of the table")

    check = _command(commands, "check", "does a prior fit a model, and are its files as they were built?", _check)
    check.add_argument("prior", metavar="PRIOR", help="a prior's folder, or a Hub id")
    check.add_argument("--model", metavar="DIR", help=f"fit this model? reads names and shapes only; {_CHECKPOINT}")
    check.add_argument("--verify", action="store_true", help="read the prior through and compare its checksums")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    what: str,
    run: Callable[[argparse.Namespace, Console], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=f"{name}: {what}", epilog=_EXIT_STATUS)
    parser.set_defaults(run=run)
    return parser


def _modules(text: str) -> list[str]:
    """A regular expression may hold commas, so `re:` takes all that follows, up to the next `,re:`."""
    presets, *patterns = re.split(r"(?:^|,)re:", text)
    modules = [module for module in presets.split(",") if module] + [f"re:{pattern}" for pattern in patterns]
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
