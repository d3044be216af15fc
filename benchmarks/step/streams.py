"""The limit of our step on a CPU: a step that reads and writes the same buffers, in the same order and with the same
threads, but computes almost nothing (streams.cpp)."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from drift_kernels.kernels import cpu
from drift_kernels.kernels.plan import Plan

from .contender import Contender

NAME = "streams"
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC"


@cache
def compiler() -> str | None:
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def wanted(contenders: list[str] | None) -> bool:
    """Whether it was requested and can be compiled; prints a message if it cannot."""
    if contenders is None or NAME not in contenders:
        return False
    if compiler() is None:
        print(f"Left out: {NAME}: no C++ compiler was found", file=sys.stderr)
    return compiler() is not None


@cache
def _library() -> ctypes.CDLL:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    library = f"{folder.name}/streams.so"
    subprocess.run([str(compiler()), *FLAGS.split(), str(SOURCE), "-o", library], check=True)
    return ctypes.CDLL(library)


def beside(one: Contender) -> list[Contender]:
    """A contender, and its streams if it runs on the cpu backend."""
    return [one, streams(one)] if one.name == "cpu" else [one]


def streams(ours: Contender) -> Contender:
    """The streams of a contender on the cpu backend. They use its parameters and states and keep their values."""
    _library()

    def step() -> None:
        with _instead_of_kernels():
            ours.step()

    return Contender(NAME, NAME, ours.scaling, ours.state_dtype, ours.bytes, step, clip=ours.clip, mode=ours.mode)


@contextmanager
def _instead_of_kernels() -> Iterator[None]:
    kernels = cpu.update, cpu.grad_stats
    cpu.update, cpu.grad_stats = _update, _grad_stats  # type: ignore[assignment]
    try:
        yield
    finally:
        cpu.update, cpu.grad_stats = kernels  # type: ignore[assignment]


def _update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    _sweep(plan, with_delta, writes=True)


def _grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    _sweep(plan, with_delta, writes=False)
    out.zero_()


def _sweep(plan: Plan, with_delta: bool, writes: bool) -> None:
    itemsize = {name: nbytes // plan.numel for name, nbytes in plan.nbytes.items() if not name.endswith("_scale")}
    scale = {name: 4 for name in plan.nbytes if name.endswith("_scale")}
    delta = (itemsize.get("delta", 0), scale.get("delta_scale", 0)) if with_delta else (0, 0)
    sizes = (ctypes.c_int64 * 7)(
        itemsize["param"],
        itemsize.get("residual", 0),
        plan.dtypes.grad.itemsize,
        itemsize["exp_avg"],
        scale.get("exp_avg_scale", 0),
        *delta,
    )
    rows, grads = (ctypes.c_void_p(table.data_ptr()) for table in (plan.table, plan.grad_table))
    count, threads = ctypes.c_int64(len(plan)), ctypes.c_int(torch.get_num_threads())
    _library().sweep(rows, grads, count, sizes, ctypes.c_bool(writes), threads)
