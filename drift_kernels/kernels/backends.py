"""The backends: each implements three primitives over a Plan for one type of device.

A backend is a module in this folder that implements `Backend`. `resolve` picks one.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from functools import cache
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from .filling import Filling
from .plan import Plan

log = logging.getLogger("drift_kernels")

Name = Literal["auto", "cuda", "triton", "cpu", "reference"]
NAMES = get_args(Name)[1:]

# The backends that "auto" tries for a device type, in order; any other device type uses the reference.
AUTO = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


class Backend(Protocol):
    __name__: str
    CAPTURABLE: bool  # whether a CUDA graph can capture its launches
    READS_TENSORS: bool  # whether it reads `plan.operands`, not only the tables of the plan
    FILLS_COEFFICIENTS: bool  # whether it has `fill_coefficients` and `prepare`; the others rely on coefficients.py

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot run on `device`; None if it can."""

    def grad_stats(self, plan: Plan, out: Tensor, *, with_delta: bool) -> None:
        """Write sum(g*g) and sum(g*delta) of each tensor to `out`, float64 [n, 2] on the plan's device.

        Results are deterministic. Without deltas (none in the plan, or not `with_delta`), the second column is 0.
        """

    def update(self, plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
        """Apply `reference.drift_adamw_` to every tensor in one pass, tensor t with row t of `coefficients` (float32
        [n, 12] on the plan's device, the fields of `Coefficients`). If the row's step is 0, nothing is written."""

    def bias(self, plan: Plan, coefficients: Tensor) -> None:
        """Apply `reference.bias_` to every gradient in place, with the same kind of coefficients. The plan must have
        deltas; states are not read."""

    def fill_coefficients(self, filling: Filling) -> None:
        """Fill the coefficients of a step in one launch, bitwise identical to coefficients.py. Call `Filling.prepare`
        first."""

    def prepare(self, plan: Plan) -> None:
        """Load and allocate what the launches of a plan may need, because this is not possible during graph capture."""


def load(name: str) -> Backend:
    module = "triton.backend" if name == "triton" else name
    return cast(Backend, importlib.import_module(f"{__package__}.{module}"))


def check_name(name: str) -> None:
    """Raise ValueError if there is no backend `name`."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")


def check_devices(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise BackendUnavailableError if the backend `name` (unless "auto") does not support the devices of `tensors`."""
    if name != "auto":
        for device in {tensor.device for tensor in tensors}:
            resolve(name, device)


def unavailable(device: torch.device) -> dict[str, str | None]:
    """What "auto" tries on `device`, in this order: why each cannot run there, or None."""
    return {name: load(name).unavailable(device) for name in AUTO.get(device.type, ("reference",))}


@cache
def resolve(name: str, device: torch.device) -> Backend:
    """Return the backend for tensors on `device`. Only "auto" falls back to another backend, and logs that once.

    Raises:
        ValueError: If there is no backend `name`.
        BackendUnavailableError: If it cannot run on `device`; the message gives the reason.
    """
    check_name(name)
    candidates = AUTO.get(device.type, ("reference",)) if name == "auto" else (name,)
    reasons: list[str] = []
    for candidate in candidates:
        backend = load(candidate)
        reason = backend.unavailable(device)
        if reason is None:
            if reasons:
                log.warning("backend='auto' falls back to %r on %s: %s", candidate, device, "; ".join(reasons))
            return backend
        reasons.append(f"{candidate!r} is unavailable: {reason}")
    raise BackendUnavailableError(f"no backend for tensors on {device}: {'; '.join(reasons)}")
