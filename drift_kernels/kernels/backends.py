"""The backends: three primitives over a Plan, for one kind of device each.

A backend is a module of this folder with the contents of `Backend`. `resolve` picks one.
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

# What "auto" tries for a device type, in this order; any other device type takes the reference.
AUTO = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


class Backend(Protocol):
    __name__: str
    CAPTURABLE: bool  # whether a CUDA graph can hold its launches
    READS_TENSORS: bool  # whether it reads `plan.operands`, and not only what stands in the plan's tables
    FILLS_COEFFICIENTS: bool  # whether it has `fill_coefficients` and `prepare`; coefficients.py serves the others

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot run on `device`; None if it can."""

    def grad_stats(self, plan: Plan, out: Tensor, *, with_delta: bool) -> None:
        """Writes sum(g*g) and sum(g*delta) of each tensor to `out`, float64 [n, 2] on the plan's device.

        Deterministic from run to run. Without a delta (none in the plan, or not `with_delta`) the second column is 0.
        """

    def update(self, plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
        """One pass: `reference.drift_adamw_` on every tensor, with row t of `coefficients` (float32 [n, 12] on the
        plan's device, the fields of `Coefficients`) for tensor t. Where the row's step is 0, nothing is written."""

    def bias(self, plan: Plan, coefficients: Tensor) -> None:
        """`reference.bias_` on every gradient, in place, with such coefficients; the plan has deltas, and no states are
        read."""

    def fill_coefficients(self, filling: Filling) -> None:
        """One launch: what coefficients.py makes of a step, bit for bit, after its `Filling.prepare`."""

    def prepare(self, plan: Plan) -> None:
        """Loads and allocates what the launches of a plan may need, since a CUDA graph that is captured can not."""


def load(name: str) -> Backend:
    module = "triton.backend" if name == "triton" else name
    return cast(Backend, importlib.import_module(f"{__package__}.{module}"))


def check_name(name: str) -> None:
    """Raises ValueError if no backend is called `name`."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")


def check_devices(name: str, tensors: Iterable[Tensor]) -> None:
    """Raises BackendUnavailableError if a backend that is asked for by name cannot run where these are."""
    if name != "auto":
        for device in {tensor.device for tensor in tensors}:
            resolve(name, device)


def unavailable(device: torch.device) -> dict[str, str | None]:
    """What "auto" tries on `device`, in this order: why each cannot run there, or None."""
    return {name: load(name).unavailable(device) for name in AUTO.get(device.type, ("reference",))}


@cache
def resolve(name: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`.

    Raises:
        ValueError: no backend is called `name`.
        BackendUnavailableError: it cannot run on `device`; the message says why. Only "auto" falls back, and logs
        that once.
    """
    check_name(name)
    candidates = AUTO.get(device.type, ("reference",)) if name == "auto" else (name,)
    reasons: list[str] = []
    for candidate in candidates:
        backend = load(candidate)
        reason = backend.unavailable(device)
        if reason is None:
            if reasons:
                log.warning("backend 'auto' uses %r on %s: %s", candidate, device, "; ".join(reasons))
            return backend
        reasons.append(f"{candidate!r} is unavailable: {reason}")
    raise BackendUnavailableError(f"no backend for tensors on {device}: {'; '.join(reasons)}")
