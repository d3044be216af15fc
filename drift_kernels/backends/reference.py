"""The reference backend: the specification, tensor by tensor, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..coefficients import Coefficients
from ..plan import Plan

CAPTURABLE = True


def unavailable(device: torch.device) -> str | None:
    return None


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    for t, (operands, grad) in enumerate(zip(plan.operands, plan.grads, strict=True)):
        out[t] = reference.grad_stats(grad, reference.read_delta(operands) if with_delta else None)


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    for operands, grad, row in zip(plan.operands, plan.grads, coefficients, strict=True):
        reference.drift_adamw_(operands, grad, Coefficients(*row.unbind()), with_delta=with_delta)


def bias(plan: Plan, coefficients: Tensor) -> None:
    for operands, grad, row in zip(plan.operands, plan.grads, coefficients, strict=True):
        reference.bias_(operands, grad, Coefficients(*row.unbind()))
