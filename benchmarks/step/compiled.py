"""A rival compiled by `torch.compile`: the whole biased AdamW update as one function over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .problem import ADAMW, ALPHA, BETAS, EPS, LR, MAX_GRAD_NORM, WEIGHT_DECAY


class CompiledAdamW(Optimizer):
    """AdamW with the bias included, for parameters that all have a gradient.

    The states have the dtype of the parameters; the arithmetic is float32, in the order of torch's AdamW. The step
    count is a tensor, so that only the first step compiles.
    """

    def __init__(self, params: list[Tensor], deltas: list[Tensor | None], scaling: str, clip: bool) -> None:
        super().__init__(params, dict(ADAMW))
        # Parameters with a delta come first: `_update` slices the lists.
        order = sorted(range(len(params)), key=lambda i: deltas[i] is None)
        self._params = [params[i] for i in order]
        self._deltas = [delta for delta in deltas if delta is not None]
        self._step_count = torch.zeros((), device=params[0].device)
        for param in self._params:
            zeros = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
            self.state[param] = {"step": self._step_count, **zeros}
        self._scaling, self._clip = scaling, clip
        self._update = torch.compile(_update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            raise NotImplementedError("CompiledAdamW does not support a closure")
        self._update(
            self._params,
            [param.grad for param in self._params],
            self._deltas,
            [self.state[param]["exp_avg"] for param in self._params],
            [self.state[param]["exp_avg_sq"] for param in self._params],
            self._step_count,
            self._scaling,
            self._clip,
        )


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    deltas: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    scaling: str,
    clip: bool,
) -> None:
    """Update params, states and step in place; the first len(deltas) parameters are biased.

    Uses torch's list operations, since the compiler fuses them across tensors.
    """
    beta1, beta2 = BETAS
    step.add_(1)
    bias_correction1 = 1 - beta1**step
    bias_correction2_sqrt = (1 - beta2**step).sqrt()

    count = len(deltas)
    g = [grad.float() for grad in grads]
    d = [delta.float() for delta in deltas]
    if scaling != "decoupled":
        g = [*torch._foreach_sub(g[:count], _bias(g[:count], d, scaling)), *g[count:]]
    if clip:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in g]))
        g = torch._foreach_mul(g, (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0))

    m = torch._foreach_lerp([x.float() for x in exp_avgs], g, 1 - beta1)
    v = torch._foreach_mul([x.float() for x in exp_avg_sqs], beta2)
    v = torch._foreach_add(v, torch._foreach_mul(torch._foreach_mul(g, g), 1 - beta2))
    denom = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(v), bias_correction2_sqrt), EPS)
    p = torch._foreach_mul([x.float() for x in params], 1 - LR * WEIGHT_DECAY)
    p = torch._foreach_sub(p, torch._foreach_mul(torch._foreach_div(m, denom), LR / bias_correction1))
    if scaling == "decoupled":
        p = [*torch._foreach_add(p[:count], d, alpha=LR * ALPHA), *p[count:]]

    for targets, sources in ((params, p), (exp_avgs, m), (exp_avg_sqs, v)):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _bias(g: list[Tensor], d: list[Tensor], scaling: str) -> tuple[Tensor, ...]:
    """What is subtracted from each gradient."""
    if scaling == "absolute":
        return torch._foreach_mul(d, ALPHA)
    coefs = []
    for grad, delta in zip(g, d, strict=True):
        grad_norm, delta_norm = torch.linalg.vector_norm(grad), torch.linalg.vector_norm(delta)
        coef = ALPHA * grad_norm / delta_norm
        if scaling == "adaptive_cosine":
            coef = coef * (1 + (grad * delta).sum() / (grad_norm * delta_norm)) / 2
        coefs.append(coef)
    return torch._foreach_mul(d, coefs)
