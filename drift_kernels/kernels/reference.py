"""The specification in plain PyTorch: one step of one tensor, and its gradient bias alone. Every backend is bitwise
identical to it. It is also a backend itself, tensor by tensor on any device.

Arithmetic is IEEE binary32 with every operation rounded separately, in the order written here (docs/numerics.md). AdamW
is Algorithm 2 of Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), in the form of
`torch.optim.AdamW`; the gradient bias is that of DRIFT (arXiv 2510.15050).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.blocks import decode_delta, decode_state, encode_state
from ..formats.philox import EXP_AVG, EXP_AVG_SQ, PARAM, random_bits
from ..formats.rounding import join, round_stochastically, round_to, split, sqrt
from .coefficients import Coefficients
from .operands import Operands
from .plan import Plan

CAPTURABLE = True
READS_TENSORS = True
FILLS_COEFFICIENTS = False


def drift_adamw_(operands: Operands, grad: Tensor, c: Coefficients, *, with_delta: bool = True) -> None:
    """One step of AdamW on the biased gradient, in place:

        g          = grad_coef*grad [- delta_coef*delta]
        exp_avg    = beta1*exp_avg + one_minus_beta1*g
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*(g*g)
        param      = param*decay [+ delta_step*delta] - step_size*(exp_avg/(sqrt(exp_avg_sq)*inv_sqrt_bc2 + eps))

    where the terms in brackets are evaluated only if there is a delta and `with_delta`. All inputs (also codes with
    scales, and the two halves of a master weight) are read as float32, and results are rounded once, when stored.

    Args:
        operands: param (any shape; float32, bfloat16 or float16), states and residual are overwritten; delta is only
            read.
        grad: same shape as param; param's dtype or float32. Only read.
        c: the scalars of the step, each a float32 tensor of shape [] (see `coefficients.py` for their formulas). If
            its step is 0, the update is skipped and nothing changes.

    Non-finite elements behave as in `torch.optim.AdamW`: a NaN or Inf in the gradient reaches the states and param of
    its element (and, with one-byte states, its whole block in the next step).
    """
    o = operands
    assert o.exp_avg is not None
    assert o.exp_avg_sq is not None
    p = o.param.float() if o.residual is None else join(o.param, o.residual)
    g = c.grad_coef * grad.float()
    decayed = p * c.decay
    delta = read_delta(o) if with_delta else None
    if delta is not None:
        g = g - c.delta_coef * delta
        decayed = decayed + c.delta_step * delta
    m = c.beta1 * _read(o.exp_avg, o.exp_avg_scale) + c.one_minus_beta1 * g
    v = c.beta2 * _read(o.exp_avg_sq, o.exp_avg_sq_scale) + c.one_minus_beta2 * (g * g)
    update = m / (sqrt(v) * c.inv_sqrt_bc2 + c.eps)
    p = decayed - c.step_size * update

    if o.residual is None:
        _write(o, "param", p, c.step, PARAM)
    else:
        _overwrite((o.param, o.residual), split(p), c.step)
    _write(o, "exp_avg", m, c.step, EXP_AVG)
    _write(o, "exp_avg_sq", v, c.step, EXP_AVG_SQ)


def bias_(operands: Operands, grad: Tensor, c: Coefficients) -> None:
    """Bias the gradient in place, for any optimizer to use:

        grad = grad - delta_coef*delta

    in float32 with each operation rounded separately, then rounded once to grad's dtype, to nearest, ties to even.

    Args:
        operands: only delta is read; nothing is written.
        grad: same shape as param; float32, bfloat16 or float16. Overwritten.
        c: only delta_coef is used.
    """
    delta = read_delta(operands)
    if delta is not None:
        grad.copy_(round_to(grad.float() - c.delta_coef * delta, grad.dtype))


def read_delta(operands: Operands) -> Tensor | None:
    """Return the delta in float32 on param's device, decoded if it is stored as codes."""
    if operands.delta is None:
        return None
    device = operands.param.device
    delta = operands.delta.to(device)
    return delta.float() if operands.delta_scale is None else decode_delta(delta, operands.delta_scale.to(device))


def _read(state: Tensor, scale: Tensor | None) -> Tensor:
    return state.float() if scale is None else decode_state(state, scale)


def _overwrite(targets: tuple[Tensor, ...], values: tuple[Tensor, ...], step: Tensor) -> None:
    """Overwrite the targets, unless the step is 0."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(torch.where(step == 0, target, value.view_as(target)))


def _write(operands: Operands, name: str, x: Tensor, step: Tensor, stream: int) -> None:
    target, scale = getattr(operands, name), getattr(operands, f"{name}_scale", None)
    if scale is not None:
        _overwrite((target, scale), encode_state(x, target.dtype), step)
    elif operands.random_key is not None and target.dtype == torch.bfloat16:
        bits = random_bits(operands.random_key, step, stream, operands.place.indices(x.numel(), x.device))
        _overwrite((target,), (round_stochastically(x, bits.view(x.shape)),), step)
    else:
        _overwrite((target,), (round_to(x, target.dtype),), step)


def sums(grad: Tensor, delta: Tensor | None) -> Tensor:
    """Return sum(g*g) and sum(g*delta) of one tensor, float64 [2]; the second is 0 without a delta."""
    g = grad.flatten().double()
    gd = g.new_zeros(()) if delta is None else torch.dot(g, delta.flatten().double())
    return torch.stack((torch.dot(g, g), gd))


# The backend interface (`backends.Backend`)


def unavailable(device: torch.device) -> str | None:
    return None


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    for t, (operands, grad) in enumerate(zip(plan.operands, plan.grads, strict=True)):
        out[t] = sums(grad, read_delta(operands) if with_delta else None)


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    for operands, grad, row in zip(plan.operands, plan.grads, coefficients, strict=True):
        drift_adamw_(operands, grad, Coefficients(*row.unbind()), with_delta=with_delta)


def bias(plan: Plan, coefficients: Tensor) -> None:
    for operands, grad, row in zip(plan.operands, plan.grads, coefficients, strict=True):
        bias_(operands, grad, Coefficients(*row.unbind()))
