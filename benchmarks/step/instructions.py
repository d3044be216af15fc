"""Counts the instructions of a step on a CPU: python -m benchmarks.step.instructions

Times depend on the machine and its load; these numbers do not. A child process runs the cpu backend's kernels in one
thread; this one single-steps it (ptrace) and counts the extension's instructions, for tensors of two sizes: the
difference is due to the elements alone. (Valgrind does not support AVX-512.) Takes two minutes; needs Linux on x86-64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from drift_kernels import _cpu
from drift_kernels.kernels import cpu
from drift_kernels.kernels.operands import dtype_name

from ..captions import Row, commit
from ..rows import row_metadata
from .contender import drift
from .modes import BY_LABEL, Mode, label_of
from .problem import Problem

SIZES = 4096, 8192  # elements; smaller tensors have no int8 states
PTRACE_TRACEME, PTRACE_PEEKUSER, PTRACE_SINGLESTEP = 0, 3, 9
RIP = 128  # offset of the instruction pointer for PTRACE_PEEKUSER
MODES = (
    *("fp32 states", "fp32 states, master", "fp32 states, stochastic", "bf16 states", "bf16 states, stochastic"),
    *("bf16 states, stochastic, int8 prior", "int8 states", "int8 states, stochastic"),
    "int8 states, stochastic, int8 prior",
)


def code_of_extension() -> range:
    """The addresses of the backend's code."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (code,) = (line[0] for line in lines if line[-1] == _cpu.__file__ and "x" in line[1])
    begin, _, end = code.partition("-")
    return range(int(begin, 16), int(end, 16))


def count(work: Callable[[], object]) -> int:
    """Count the extension's instructions in a child process that does only this work."""
    work()  # one-time work happens here
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.restype, ptrace.argtypes = ctypes.c_long, (ctypes.c_long,) * 4
    code = code_of_extension()
    child = os.fork()
    if child == 0:
        if ptrace(PTRACE_TRACEME, 0, 0, 0) != 0:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    instructions = 0
    while os.WIFSTOPPED(status):
        instructions += ptrace(PTRACE_PEEKUSER, child, RIP, 0) in code
        ptrace(PTRACE_SINGLESTEP, child, 0, 0)
        _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise OSError("this system does not allow a process to single-step another (ptrace)")
    return instructions


def count_kernel(mode: Mode, scaling: str | None, kernel: str, numel: int) -> int:
    """Count the instructions of one of the backend's functions, as a step calls it for a bfloat16 tensor."""
    problem = Problem.random([("weight", (numel,))], ["all"], torch.bfloat16, torch.device("cpu"))
    contender = drift(problem, "cpu", scaling, mode)  # keeps the tensors alive: a plan has only their addresses
    with mock.patch.object(cpu, kernel, wraps=getattr(cpu, kernel)) as called:
        contender.step()
    return count(partial(getattr(cpu, kernel), *called.call_args.args, **called.call_args.kwargs))


def instructions_per_param(mode: Mode, scaling: str | None, kernel: str = "update") -> float:
    small, large = (count_kernel(mode, scaling, kernel, numel) for numel in SIZES)
    return (large - small) / (SIZES[1] - SIZES[0])


def measure(labels: list[str]) -> list[Row]:
    """Return a row for each mode without and with a prior, and one for the sums of a scaling that needs them."""
    metadata = row_metadata()
    wanted = [(BY_LABEL[label], scaling, "update") for label in labels for scaling in (None, "absolute")]
    wanted += [(BY_LABEL[labels[0]], "gradnorm", "grad_stats")]
    return [
        {
            "benchmark": "instructions",
            "kernel": kernel,
            "scaling": scaling or "none",
            "states": dtype_name(mode.states),
            "rounding": mode.rounding,
            "master": mode.master,
            "prior_dtype": None if scaling is None else mode.prior_name,
            "dtype": "bfloat16",
            "instruction_set": _cpu.instruction_sets()[-1],
            "instructions_per_param": instructions_per_param(mode, scaling, kernel),
            **metadata,
        }
        for mode, scaling, kernel in wanted
        if mode.prior is None or scaling is not None
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="+", choices=tuple(BY_LABEL), metavar="LABEL", default=MODES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        parser.error("this needs Linux on x86-64")
    torch.set_num_threads(1)
    rows = measure(list(args.modes))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("kernel", "prior", "mode", "instructions", box=box.SIMPLE_HEAD)
    table.title = f"Instructions per bfloat16 parameter, {rows[0]['instruction_set']}"
    table.caption = f"{rows[0]['device']}, {commit(rows[0])}"
    for row in rows:
        table.add_row(row["kernel"], row["scaling"], label_of(row), f"{row['instructions_per_param']:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
