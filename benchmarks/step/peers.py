"""The rivals: today's alternatives for an AdamW step, and for biasing its gradients by a prior.

torch keeps the states in the dtype of the parameters. If a step clips, it clips the biased gradients of all parameters
together, like ours, with `torch.nn.utils.clip_grad_norm_`. This overwrites gradients, so it works on scratch copies
that are restored before each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compiled import CompiledAdamW
from .contender import Contender, nothing
from .modes import Storage
from .problem import ADAMW, ALPHA, LR, MAX_GRAD_NORM, Problem

# Lower bound of the norms that the authors' code divides by.
NORM_FLOOR = 1e-12


def fused(problem: Problem, clip: bool = False) -> Contender:
    """torch's fused AdamW without a prior: the baseline for all other contenders."""
    params = _own_params(problem, overwrites=clip)
    optimizer = _fused_adamw(params)
    step = after_clipping(params, optimizer.step) if clip else optimizer.step
    return _contender("fused", "torch fused", problem, None, clip, optimizer, step, overwrites=clip)


def foreach(problem: Problem, clip: bool = False) -> Contender:
    """torch's foreach AdamW without a prior."""
    params = _own_params(problem, overwrites=clip)
    optimizer = torch.optim.AdamW(params, **ADAMW, foreach=True)
    step = after_clipping(params, optimizer.step) if clip else optimizer.step
    return _contender("foreach", "torch foreach", problem, None, clip, optimizer, step, overwrites=clip)


def foreach_bias(problem: Problem, scaling: str, clip: bool = False) -> Contender:
    """The bias as an experienced torch user would write it, then torch's fused AdamW.

    It makes as few passes as torch's list operations allow and no temporaries of the model's size, and computes
    norm(delta) once. It writes to the gradients, so it works on scratch copies.
    """
    params = _own_params(problem, overwrites=True)
    optimizer = _fused_adamw(params)
    adamw = after_clipping(params, optimizer.step) if clip else optimizer.step
    biased = [i for i, delta in enumerate(problem.deltas) if delta is not None]
    deltas = [problem.deltas[i] for i in biased]
    grads = [problem.scratch_grads[i] for i in biased]
    delta_norms = torch.stack(torch._foreach_norm(deltas, dtype=torch.float32))

    def absolute() -> None:
        torch._foreach_add_(grads, deltas, alpha=-ALPHA)
        adamw()

    def by_norm() -> None:
        grad_norms = torch.stack(torch._foreach_norm(grads, dtype=torch.float32))
        coefs = ALPHA * grad_norms / delta_norms
        if scaling == "adaptive_cosine":
            dots = torch.stack([torch.dot(g.flatten(), d.flatten()) for g, d in zip(grads, deltas, strict=True)])
            coefs = coefs * (1 + dots / (grad_norms * delta_norms)) / 2
        torch._foreach_addcmul_(grads, deltas, coefs.to(problem.dtype).unbind(), value=-1)
        adamw()

    def decoupled() -> None:
        adamw()
        torch._foreach_add_([params[i] for i in biased], deltas, alpha=LR * ALPHA)

    step = {"absolute": absolute, "gradnorm": by_norm, "adaptive_cosine": by_norm, "decoupled": decoupled}[scaling]
    label = "foreach bias + torch fused"
    return _contender("foreach_bias", label, problem, scaling, clip, optimizer, step, overwrites=True)


def hook(problem: Problem, scaling: str, clip: bool = False) -> Contender:
    """The authors' hooks, then torch's fused AdamW.

    The hooks are called on existing gradients, not by a backward pass, so the cost of autograd is not counted.
    """
    params = _own_params(problem, overwrites=clip)
    optimizer = _fused_adamw(params)
    adamw = after_clipping(params, optimizer.step) if clip else optimizer.step
    hooks = [
        (param, param.grad, authors_hook(delta, ALPHA, scaling))
        for param, delta in zip(params, problem.host_deltas, strict=True)
        if delta is not None
    ]

    def step() -> None:
        for param, grad, bias in hooks:
            param.grad = bias(grad)
        adamw()

    label = "authors' hook + torch fused"
    return _contender("hook", label, problem, scaling, clip, optimizer, step, overwrites=clip)


def authors_hook(host_delta: Tensor, alpha: float, scaling: str) -> Callable[[Tensor], Tensor]:
    """The tensor hook with which DRIFT's authors (arXiv 2510.15050) bias a gradient, re-created from its description.

        absolute         g - alpha * delta
        gradnorm         g - alpha * norm(g) * delta/norm(delta)
        adaptive_cosine  g - alpha * (1 + cos(g, delta))/2 * norm(g) * delta/norm(delta)

    The delta stays on the host in its stored dtype and moves to the gradient's device in every backward pass; both
    norms are recomputed each time, and every intermediate is a tensor of the gradient's size.
    """

    def hook(grad: Tensor) -> Tensor:
        delta = host_delta.to(device=grad.device, dtype=grad.dtype)
        if scaling == "absolute":
            return grad - alpha * delta
        grad_norm = grad.norm().clamp(min=NORM_FLOOR)
        delta_norm = delta.norm().clamp(min=NORM_FLOOR)
        strength: float | Tensor = alpha
        if scaling == "adaptive_cosine":
            cosine = ((grad * delta).sum() / (grad_norm * delta_norm)).clamp(-1, 1)
            strength = alpha * (1 + cosine) / 2
        return grad - strength * grad_norm * (delta / delta_norm)

    return hook


def compiled(problem: Problem, scaling: str, clip: bool = False) -> Contender:
    """The whole biased update as one function under `torch.compile`, including clipping."""
    params = _own_params(problem, overwrites=False)
    optimizer = CompiledAdamW(params, problem.deltas, scaling, clip)
    return _contender("compiled", "torch.compile with the bias", problem, scaling, clip, optimizer, optimizer.step)


def _own_params(problem: Problem, overwrites: bool) -> list[Tensor]:
    return problem.own_params(problem.scratch_grads if overwrites else None)


def _fused_adamw(params: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **ADAMW, fused=True)


def after_clipping(params: list[Tensor], step: Callable[[], Any]) -> Callable[[], None]:
    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        step()

    return clip_and_step


def _contender(
    name: str,
    label: str,
    problem: Problem,
    scaling: str | None,
    clip: bool,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    overwrites: bool = False,
) -> Contender:
    """A contender with states in the dtype of the parameters; `overwrites`: it uses the scratch gradients."""
    itemsize = problem.dtype.itemsize
    on_device = [] if scaling is None or name == "hook" else list(problem.prior.values())
    return Contender(
        name,
        label,
        scaling,
        problem.dtype,
        problem.bytes_to_move(scaling, Storage.plain(2 * itemsize, itemsize), clip),
        step,
        optimizer,
        problem.restore_scratch_grads if overwrites else nothing,
        clip,
        on_device,
    )


# Rivals by name: without a prior, and with a prior and the scalings that they support.
WITHOUT_PRIOR = {"fused": fused, "foreach": foreach}
WITH_PRIOR = {"foreach_bias": foreach_bias, "hook": hook, "compiled": compiled}
# The scalings that each supports.
SCALINGS = {
    "foreach_bias": ("absolute", "gradnorm", "adaptive_cosine", "decoupled"),
    "hook": ("absolute", "gradnorm", "adaptive_cosine"),
    "compiled": ("absolute", "gradnorm", "adaptive_cosine", "decoupled"),
}
