"""Times one optimizer step against its rivals, interleaved in one process: python -m benchmarks.step

First it compares every backend with the reference; if one differs, it measures nothing. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from ..rows import row_metadata
from . import bars, lineup, modes, roofline, shapes, streams
from .contender import BACKENDS, copy
from .libraries import LIBRARIES
from .lineup import SCALINGS
from .measure import measure
from .memory import Memory
from .modes import Mode
from .parity import ParityError, check_parity
from .peers import WITH_PRIOR, WITHOUT_PRIOR
from .problem import Problem
from .table import make_rows, print_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_PARAMS = {"cpu": 64_000_000, "cuda": 256_000_000}
TABLE_WIDTH = {"cpu": 150, "cuda": 170}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    our_backends = lineup.chosen_backends(args.contenders, device)
    our_libraries = lineup.chosen_libraries(args.contenders, device, dtype)
    our_modes = chosen_modes(parser, args)
    clips = [name == "yes" for name in dict.fromkeys(args.clip)]
    entries = lineup.entries(
        args.contenders, our_backends, our_libraries, args.scaling, clips, dtype, our_modes, device
    )
    scale = args.scale or 1.0
    if args.scale is None and args.layers is None:
        scale = shapes.fit(args.model, args.params or DEFAULT_PARAMS[device.type])
    named_shapes = shapes.named_shapes(args.model, scale, args.layers)
    with_copy = args.model != shapes.TINY
    check_memory(parser, lineup.needed_bytes(named_shapes, args.modules, dtype, entries, with_copy, device), device)
    try:
        for backend in our_backends:
            for mode in our_modes:
                check_parity(backend, device, dtype, mode)
    except ParityError as error:
        print(f"Nothing was measured: {error}", file=sys.stderr)
        return 1

    metadata = row_metadata(device)
    problem = Problem.random(named_shapes, args.modules, dtype, device)
    contenders = [entry.make(problem) for entry in entries]
    if with_copy and streams.wanted(args.contenders):
        contenders = [each for one in contenders for each in streams.beside(one)]
    if with_copy:
        contenders.insert(0, copy(problem))
    timings = measure(contenders, device, args.reps)
    memory = [Memory.of(contender, device) for contender in contenders]
    common = {
        "benchmark": "step",
        "model": args.model,
        "scale": scale,
        "layers": args.layers,
        "modules": ",".join(args.modules),
        "tensors": len(problem.params),
        "params": problem.numel,
        "biased_params": sum(delta.numel() for delta in problem.prior.values()),
        "dtype": args.dtype,
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "reps": args.reps,
        **metadata,
    }
    rows = make_rows(contenders, timings, memory, common)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot is not None:
        bars.draw(rows, args.plot)
    if args.roofline is not None:
        roofline.draw(rows, args.roofline)
    print_table(rows, Console(width=max(TABLE_WIDTH[device.type], Console().width)))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Times one step of FusedDriftAdamW against its rivals, interleaved in one process.",
    )
    parser.add_argument("--device", choices=tuple(BACKENDS), default="cpu")
    parser.add_argument(
        "--model",
        "--shapes",
        choices=shapes.NAMES,
        default="qwen2.5-vl-7b",
        help="the model whose parameters are stepped; tiny: 729 tensors of 8 elements (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--params",
        type=parse_count,
        metavar="N",
        help="narrow the model to about this many parameters (default: 64M on a CPU, 256M on a GPU)",
    )
    size.add_argument("--scale", type=float, help="divide every width and the vocabulary by this")
    size.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="keep the first N layers of the text model and of the vision tower, at full width",
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        choices=tuple(shapes.MODULES),
        default=["all"],
        help="modules that the prior covers (default: every tensor)",
    )
    parser.add_argument(
        "--scaling",
        nargs="+",
        choices=SCALINGS,
        default=[name for name in SCALINGS if name != "decoupled"],
        help="default: all but decoupled",
    )
    parser.add_argument(
        "--clip",
        nargs="+",
        choices=("no", "yes"),
        default=["no"],
        help="whether a step clips the gradients to a norm of 1: ours within the step, rivals before it (default: no)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="dtype of params, grads and deltas")
    add_modes(parser)
    ours = dict.fromkeys(name for names in BACKENDS.values() for name in names)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=(*WITHOUT_PRIOR, *WITH_PRIOR, *LIBRARIES, streams.NAME, *ours),
        help="default: all that the device can run, except the reference and, on a CPU, `compiled`, libraries and "
        "`streams`; torch fused always runs",
    )
    parser.add_argument("--reps", type=int, default=20, help="repetitions of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the rows to FILE, as bars")
    parser.add_argument("--roofline", type=Path, metavar="FILE", help="plot the rows to FILE, as bytes against time")
    return parser


def add_modes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("modes of ours", "every combination of these, or those listed in --modes")
    group.add_argument(
        "--states", nargs="+", choices=tuple(modes.STATES), help="default: float32, and torch's dtype if it differs"
    )
    group.add_argument("--rounding", nargs="+", choices=modes.ROUNDINGS, help="default: nearest")
    group.add_argument("--master", nargs="+", choices=tuple(modes.MASTER), help="float32 master weights; default: no")
    group.add_argument(
        "--prior-dtype",
        nargs="+",
        choices=tuple(modes.PRIORS),
        help="same: the parameters' dtype; int8 and fp8: small priors (default: same)",
    )
    group.add_argument(
        "--prior-device",
        nargs="+",
        choices=tuple(modes.PRIOR_DEVICES),
        help="cpu: a GPU reads the prior from pinned host memory (default: same)",
    )
    group.add_argument(
        "--modes",
        nargs="+",
        choices=tuple(modes.BY_LABEL),
        metavar="LABEL",
        help="names as in the table, such as 'int8 states, stochastic, int8 prior'",
    )


def chosen_modes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Mode]:
    """Return the modes supported for the parameters; print which are left out, and why."""
    combined = (args.states, args.rounding, args.master, args.prior_dtype, args.prior_device)
    if args.modes is not None and any(combined):
        parser.error("--modes cannot be combined with --states, --rounding, --master, --prior-dtype and --prior-device")
    wanted = [modes.BY_LABEL[label] for label in dict.fromkeys(args.modes or ())] or modes.combinations(
        args.states or default_states(args.dtype),
        args.rounding or ["nearest"],
        args.master or ["no"],
        args.prior_dtype or ["same"],
        args.prior_device or ["same"],
    )
    refused = modes.refusals(wanted, DTYPES[args.dtype], args.device)
    left_out = [f"{'; '.join(mode.label for mode in some)}: {reason}" for reason, some in refused.items()]
    chosen = [mode for mode in wanted if not any(mode in some for some in refused.values())]
    if not chosen:
        parser.error(f"no mode is left for {args.dtype} parameters. {'. '.join(left_out)}")
    for line in left_out:
        print(f"Left out: {line}", file=sys.stderr)
    return chosen


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.reps < 2:
        parser.error("--reps must be at least 2, for a spread")
    if args.scale is not None and args.scale < 1:
        parser.error("--scale must be at least 1")
    if args.layers is not None and args.layers < 1:
        parser.error("--layers must be at least 1")
    if args.model == shapes.TINY and (args.scale or args.params or args.layers):
        parser.error("the tiny list has a fixed size")
    if args.model == shapes.TINY and args.roofline:
        parser.error("--roofline: the tiny list moves almost no bytes")


def check_memory(parser: argparse.ArgumentParser, needed: int, device: torch.device) -> None:
    free = lineup.free_bytes(device)
    if free is not None and needed > free:
        parser.error(
            f"these contenders need about {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: "
            "use fewer --contenders, --scaling or modes, or a smaller --params or --layers"
        )


def parse_count(text: str) -> int:
    """Parse a count such as 64M, 1.5B, 300k or 1000."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        count = int(float(text) if unit is None else float(text[:-1]) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a number of parameters such as 64M, got {text!r}")
    return count


def default_states(dtype: str) -> list[str]:
    """The states of torch's optimizers, if ours support them, and float32."""
    return ["bfloat16", "float32"] if dtype == "bfloat16" else ["float32"]
