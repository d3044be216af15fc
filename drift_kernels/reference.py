"""The specification: what one step does to one tensor, in plain PyTorch. Every backend gives its bits.

Arithmetic is IEEE binary32 with every operation rounded by itself, in the order written here (docs/numerics.md). AdamW
is Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), Algorithm 2, in the form of
`torch.optim.AdamW`; the bias of the gradient is DRIFT (arXiv 2510.15050).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import Coefficients
from .lossless import EXP_AVG, EXP_AVG_SQ, PARAM, join, random_bits, round_stochastically, split


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `x` rounded to `dtype`, to nearest, ties to even; a NaN to the canonical quiet NaN."""
    if dtype == torch.float32:
        return x
    return torch.where(x.isnan(), torch.full((), float("nan"), dtype=dtype, device=x.device), x.to(dtype))


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 root of float32 `x`.

    (`torch.sqrt` on the CPU is an ulp off for a fifth of its inputs; the float64 root, rounded once more, is exact.)
    """
    return x.double().sqrt().float()


def drift_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Tensor | None,
    c: Coefficients,
    *,
    residual: Tensor | None = None,
    random_key: int | None = None,
) -> None:
    """One step of AdamW on the biased gradient, in place:

        g          = grad_coef*grad [- delta_coef*delta]
        exp_avg    = beta1*exp_avg + one_minus_beta1*g
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*(g*g)
        param      = param*decay [+ delta_step*delta] - step_size*(exp_avg/(sqrt(exp_avg_sq)*inv_sqrt_bc2 + eps))

    where the terms in brackets are evaluated if and only if there is a delta.

    Args:
        param: any shape; float32, bfloat16 or float16. Overwritten.
        grad: of param's shape; param's dtype or float32. Only read.
        exp_avg, exp_avg_sq: of param's shape; float32 or bfloat16. Overwritten.
        delta: of param's shape, float32 or bfloat16, or None. Only read.
        c: the step's scalars, each a float32 tensor of shape [] (see `coefficients.py` for their formulas).
        residual: of param's shape, int16; with a bfloat16 param the two halves of a float32 master. Overwritten.
        random_key: rounds what is bfloat16, but a param that has a residual, at random (`lossless.random_bits`).

    Non-finite elements behave as in `torch.optim.AdamW`: a NaN or Inf in the gradient reaches that element's states and
    param.
    """
    p = param.float() if residual is None else join(param, residual)
    g = c.grad_coef * grad.float()
    decayed = p * c.decay
    if delta is not None:
        delta = delta.float()
        g = g - c.delta_coef * delta
        decayed = decayed + c.delta_step * delta
    m = c.beta1 * exp_avg.float() + c.one_minus_beta1 * g
    v = c.beta2 * exp_avg_sq.float() + c.one_minus_beta2 * (g * g)
    update = m / (sqrt(v) * c.inv_sqrt_bc2 + c.eps)
    p = decayed - c.step_size * update

    for target, x, stream in ((param, p, PARAM), (exp_avg, m, EXP_AVG), (exp_avg_sq, v, EXP_AVG_SQ)):
        if target is param and residual is not None:
            for half, value in zip((param, residual), split(p), strict=True):
                half.copy_(value)
        elif random_key is not None and target.dtype == torch.bfloat16:
            bits = random_bits(random_key, int(c.step), stream, x.numel(), x.device)
            target.copy_(round_stochastically(x, bits.view(x.shape)))
        else:
            target.copy_(round_to(x, target.dtype))


def grad_stats(grad: Tensor, delta: Tensor | None) -> Tensor:
    """float64 [2]: sum(g*g) and sum(g*delta) of one tensor (0 for the latter without a delta)."""
    g = grad.flatten().double()
    gd = g.new_zeros(()) if delta is None else torch.dot(g, delta.flatten().double())
    return torch.stack((torch.dot(g, g), gd))
