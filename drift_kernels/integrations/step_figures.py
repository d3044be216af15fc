"""The figures of the last step, as trainers log them."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from ..optimizer import FusedDriftAdamW
from ..prior.names import MODULES


def unwrap_optimizer(optimizer: Any) -> FusedDriftAdamW:
    """The FusedDriftAdamW in a trainer's wrapper: Accelerate's, Lightning's.

    Raises TypeError if there is none.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, FusedDriftAdamW):
        raise TypeError(f"expected a FusedDriftAdamW or a wrapper of one, got {type(optimizer).__name__}")
    return inner


def step_figures(optimizer: Any, prefix: str = "prior/") -> dict[str, float]:
    """What the last step did, for a log; reading it waits for the device.

    `prior/grad_norm`, the norm of the whole biased gradient, where the optimizer has a `max_grad_norm`; and for each
    module group that the prior reached (attn, mlp, norm, embed, head, other) `prior/cosine/attn`, the mean over its
    tensors of cos(gradient, delta), and `prior/ratio/attn`, that of norm(bias)/norm(gradient), where the step needed
    gradient statistics.
    """
    drift = unwrap_optimizer(optimizer)
    figures = {}
    if drift.grad_norm is not None:
        figures[f"{prefix}grad_norm"] = drift.grad_norm.item()
    cosine, ratio = drift.prior_cosine, drift.prior_ratio
    if cosine is None or ratio is None:
        return figures
    modules = drift.prior_modules
    values = dict(zip(("cosine", "ratio"), torch.stack([cosine, ratio]).tolist(), strict=True))
    for figure, of_tensors in values.items():
        for group in (*MODULES, "other"):
            if members := [v for v, module in zip(of_tensors, modules, strict=True) if module == group]:
                figures[f"{prefix}{figure}/{group}"] = fmean(members)
    return figures
