"""A backend for tests: the cuda backend's kernels, compiled for the host and run thread by thread (grid.cpp)."""

from __future__ import annotations

import ast
import ctypes
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from background import OUT, Product
from torch import Tensor

from drift_kernels.kernels.filling import Filling
from drift_kernels.kernels.layout import mismatch
from drift_kernels.kernels.plan import Plan

CAPTURABLE = True
READS_TENSORS = False
FILLS_COEFFICIENTS = True

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = shutil.which("c++")

# The kernels' flags, and a trap on misaligned accesses, as on the device.
FLAGS = "-std=c++17 -O1 -shared -fPIC -ffp-contract=off -fsanitize=alignment -fsanitize-undefined-trap-on-error"


class _Plan(ctypes.Structure):
    """struct Plan in csrc/cuda/plan.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "device_rows", "chunk_rows", "grads")] + [
        ("count", ctypes.c_int64)
    ]


LIBRARY = Product("grid.so", [str(COMPILER), *FLAGS.split(), SOURCE, "-o", OUT])


def begin() -> None:
    """Start compiling while other tests run."""
    if COMPILER is not None and not torch.cuda.is_available():
        LIBRARY.begin()


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY.path()))
    library.layout.restype = ctypes.c_char_p
    reason = mismatch(SimpleNamespace(LAYOUT=ast.literal_eval(library.layout().decode())), "cpu")
    assert reason is None, reason
    return library


def _arguments(plan: Plan, with_delta: bool) -> tuple[object, object]:
    rows, chunk_rows, grads = (t.data_ptr() for t in (plan.table, plan.chunk_tensor, plan.grad_table))
    names = [name and name.encode() for name in plan.dtype_names(with_delta)]
    return ctypes.byref(_Plan(rows, rows, chunk_rows, grads, len(plan))), (ctypes.c_char_p * 4)(*names)


def unavailable(device: torch.device) -> str | None:
    return "it runs on CPU tensors" if device.type != "cpu" else None if COMPILER else "there is no C++ compiler"


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    if plan.has_empty:
        out.zero_()
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (plan.partials, plan.arrived, out))
    _library().grad_stats(*_arguments(plan, with_delta), *pointers)


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool, first_chunk: int = 0) -> None:
    begin = ctypes.c_int64(first_chunk)
    _library().update(*_arguments(plan, with_delta), ctypes.c_void_p(coefficients.data_ptr()), begin)


def fill_coefficients(filling: Filling) -> None:
    _library().fill_coefficients(ctypes.c_void_p(filling.address))


def prepare(plan: Plan) -> None:
    _ = plan.partials, plan.arrived


def launched() -> ctypes.c_int64:
    """The number of launches so far."""
    return ctypes.c_int64.in_dll(_library(), "launched")


def bias(plan: Plan, coefficients: Tensor) -> None:
    _library().bias(*_arguments(plan, True), ctypes.c_void_p(coefficients.data_ptr()))
