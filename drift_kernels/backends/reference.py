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
    for t, grad in enumerate(plan.grads):
        delta = plan.deltas[t] if with_delta and plan.deltas is not None else None
        out[t] = reference.grad_stats(grad, delta)


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    for t, row in enumerate(coefficients):
        reference.drift_adamw_(
            plan.params[t],
            plan.grads[t],
            plan.exp_avgs[t],
            plan.exp_avg_sqs[t],
            plan.deltas[t] if with_delta and plan.deltas is not None else None,
            Coefficients(*row.unbind()),
            residual=None if plan.residuals is None else plan.residuals[t],
            random_key=None if plan.random_keys is None else plan.random_keys[t],
        )
