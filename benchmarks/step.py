"""Times one optimizer step against its rivals, interleaved in one process: python -m benchmarks.step

First every backend is compared with the reference; if one differs, nothing is measured. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from drift_kernels import backends

from . import peers, plot, shapes
from .contender import BACKENDS, Contender, copy, drift
from .measure import measure
from .parity import ParityError, check_parity
from .problem import Problem
from .report import make_rows, print_table
from .rows import row_metadata

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALINGS = ("none", "absolute", "gradnorm", "adaptive_cosine", "decoupled")
DEFAULT_PARAMS = {"cpu": 64_000_000, "cuda": 256_000_000}
TABLE_WIDTH = 120


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    chosen = chosen_backends(args.contenders, device)
    state_dtypes = [DTYPES[name] for name in dict.fromkeys(args.states or default_states(args.dtype))]
    try:
        for backend in chosen:
            for state_dtype in state_dtypes:
                check_parity(backend, device, dtype, state_dtype)
    except ParityError as error:
        print(f"Nothing was measured: {error}", file=sys.stderr)
        return 1

    metadata = row_metadata(device)
    scale = args.scale or shapes.fit(args.model, args.params or DEFAULT_PARAMS[device.type])
    problem = Problem.random(shapes.named_shapes(args.model, scale), args.modules, dtype, device)
    contenders = make_contenders(problem, args.contenders, chosen, args.scaling, state_dtypes)
    if args.model != shapes.TINY:
        contenders.insert(0, copy(problem))
    timings = measure(contenders, device, args.reps)
    common = {
        "benchmark": "step",
        "model": args.model,
        "scale": scale,
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
    rows = make_rows(contenders, timings, common)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot is not None:
        plot.draw(rows, args.plot)
    print_table(rows, Console(width=max(TABLE_WIDTH, Console().width)))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
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
        help="whose parameters; tiny: 729 tensors of 8 elements (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--params",
        type=parse_count,
        metavar="N",
        help="narrow the model to about this many parameters (default: 64M on a CPU, 256M on a GPU)",
    )
    size.add_argument("--scale", type=float, help="divide every width and the vocabulary by this")
    parser.add_argument(
        "--modules",
        nargs="+",
        choices=tuple(shapes.MODULES),
        default=["all"],
        help="what the prior covers (default: every tensor)",
    )
    parser.add_argument(
        "--scaling", nargs="+", choices=SCALINGS, default=list(SCALINGS[:4]), help="default: all but decoupled"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of params, grads and deltas")
    parser.add_argument(
        "--states", nargs="+", choices=("float32", "bfloat16"), help="of ours; default: float32, and torch's if another"
    )
    ours = dict.fromkeys(name for names in BACKENDS.values() for name in names)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=(*peers.WITHOUT_PRIOR, *peers.WITH_PRIOR, *ours),
        help="default: all that the device can run, but the reference; torch fused always runs",
    )
    parser.add_argument("--reps", type=int, default=20, help="repetitions of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.reps < 2:
        parser.error("--reps must be at least 2, for a spread")
    if args.scale is not None and args.scale < 1:
        parser.error("--scale must be at least 1")
    if args.model == shapes.TINY and (args.scale or args.params):
        parser.error("the tiny list has one size")
    return args


def parse_count(text: str) -> int:
    """64M, 1.5B, 300k or 1000."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        count = int(float(text) if unit is None else float(text[:-1]) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a number of parameters such as 64M, got {text!r}")
    return count


def default_states(dtype: str) -> list[str]:
    """Those of torch's optimizers, where ours can have them too, and float32."""
    return ["bfloat16", "float32"] if dtype == "bfloat16" else ["float32"]


def chosen_backends(wanted: list[str] | None, device: torch.device) -> list[str]:
    """Our backends among the wanted; by default those that the device can run, but for the reference, which is slow.

    One that was asked for and cannot run raises BackendUnavailableError later, with the reason.
    """
    known = BACKENDS[device.type]
    if wanted is not None:
        return [name for name in known if name in wanted]
    return [name for name in known if name != "reference" and is_available(name, device)]


def is_available(backend: str, device: torch.device) -> bool:
    """Whether the device can run a backend; says why where it cannot."""
    reason = backends.load(backend).unavailable(device)
    if reason is not None:
        print(f"Left out: backend {backend!r}: {reason}", file=sys.stderr)
    return reason is None


def make_contenders(
    problem: Problem,
    wanted: list[str] | None,
    our_backends: list[str],
    scalings: list[str],
    state_dtypes: list[torch.dtype],
) -> list[Contender]:
    """Scaling by scaling, the rivals first. torch's fused AdamW is always there: the others are measured against it."""
    contenders = [
        make(problem) for name, make in peers.WITHOUT_PRIOR.items() if wanted is None or name in {"fused", *wanted}
    ]
    for scaling in sorted(set(scalings), key=SCALINGS.index):
        contenders += [
            make(problem, scaling)
            for name, make in peers.WITH_PRIOR.items()
            if scaling in peers.SCALINGS[name] and (wanted is None or name in wanted)
        ]
        prior = None if scaling == "none" else scaling
        contenders += [drift(problem, name, prior, dtype) for name in our_backends for dtype in state_dtypes]
    return contenders


if __name__ == "__main__":
    sys.exit(main())
