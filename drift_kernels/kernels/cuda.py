"""The cuda backend: csrc/cuda, compiled when the package is installed on a machine with nvcc."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reinstalling import reinstall_command
from .filling import Filling
from .layout import mismatch
from .plan import Plan

CAPTURABLE = True  # new gradient addresses are passed as kernel parameters
READS_TENSORS = False
FILLS_COEFFICIENTS = True

_reason: str | None = None
try:
    from drift_kernels import _cuda
except ImportError as error:
    _reason = (
        f"cannot import its compiled extension ({error}); with nvcc (CUDA 12.1 or newer, on PATH or under CUDA_HOME), "
        f"build it with: {reinstall_command('cuda')}"
    )


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it supports NVIDIA GPUs only, not {'ROCm' if device.type == 'cuda' else device.type}"
    return _reason or mismatch(_cuda, "cuda") or _cuda.unusable(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _target(plan: Plan, with_delta: bool) -> _cuda.Target:
    return _cuda.Target(
        plan.table.data_ptr(),
        plan.device_table.data_ptr(),
        plan.chunk_tensor.data_ptr(),
        plan.grad_table.data_ptr(),
        len(plan),
        plan.dtype_names(with_delta),
        _index(plan.device),
        torch.cuda.current_stream(plan.device).cuda_stream,
    )


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    with torch.cuda.device(plan.device):
        if plan.has_empty:
            out.zero_()  # no block writes the sums of empty tensors
        space = plan.partials.data_ptr(), plan.arrived.data_ptr()
        _cuda.grad_stats(_target(plan, with_delta), *space, out.data_ptr())


def fill_coefficients(filling: Filling) -> None:
    with torch.cuda.device(filling.device):
        stream = torch.cuda.current_stream(filling.device).cuda_stream
        _cuda.fill_coefficients(filling.address, _index(filling.device), stream)


def prepare(plan: Plan) -> None:
    with torch.cuda.device(plan.device):
        _ = plan.partials, plan.arrived
        for with_delta in (True, False):
            _cuda.load_kernels(_target(plan, with_delta))


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    with torch.cuda.device(plan.device):
        _cuda.update(_target(plan, with_delta), coefficients.data_ptr())


def bias(plan: Plan, coefficients: Tensor) -> None:
    with torch.cuda.device(plan.device):
        _cuda.bias(_target(plan, True), coefficients.data_ptr())
