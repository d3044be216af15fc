"""The cpu backend: csrc/cpu, compiled when the package is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reinstalling import reinstall_command
from .layout import mismatch
from .plan import Plan

CAPTURABLE = False
READS_TENSORS = False
FILLS_COEFFICIENTS = False

_reason: str | None = None
try:
    from drift_kernels import _cpu
except ImportError as error:
    _reason = (
        f"cannot import its compiled extension ({error}); with a C++17 compiler (g++ or clang++, on PATH or in CXX), "
        f"build it with: {reinstall_command('cpu')}"
    )


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it supports CPU tensors only, not {device.type}"
    return _reason or mismatch(_cpu, "cpu")


def _launch(plan: Plan, with_delta: bool) -> _cpu.Launch:
    addresses = plan.table.data_ptr(), plan.grad_table.data_ptr()
    return _cpu.Launch(*addresses, len(plan), plan.dtype_names(with_delta), torch.get_num_threads())


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    _cpu.grad_stats(_launch(plan, with_delta), plan.partials.data_ptr(), out.data_ptr())


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    _cpu.update(_launch(plan, with_delta), coefficients.data_ptr())


def bias(plan: Plan, coefficients: Tensor) -> None:
    _cpu.bias(_launch(plan, True), coefficients.data_ptr())
