"""The figures of the last step, for a trainer's log."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from ..prior.names import MODULES
from .in_use import unwrap_optimizer


def step_figures(optimizer: Any, prefix: str = "prior/") -> dict[str, float]:
    """Return what the last step did, for a log. Reading it waits for the device.

    - `prior/alpha`: the current alpha; if param groups differ, the largest in magnitude.
    - `prior/bound`: how many parameters the prior covers.
    - `prior/biased`: how many of them the step biased: those that had a gradient, while alpha was not 0.
    - `prior/grad_norm`: the norm of the whole biased gradient, if the optimizer has a `max_grad_norm`.
    - `prior/cosine/attn`: the mean of cos(gradient, delta) over the tensors of a module group (attn, mlp, norm, embed,
      head or other), if the step needed gradient statistics.
    - `prior/ratio/attn`: likewise the mean of norm(bias)/norm(gradient).

    Args:
        optimizer: a `FusedDriftAdamW`, or a trainer's wrapper of one.
        prefix: of the figures' names.

    Returns:
        Names to numbers. Without a prior only `grad_norm`, before the first step nothing.

    Raises:
        TypeError: the optimizer is another one.
    """
    drift = unwrap_optimizer(optimizer)
    figures = {}
    if drift.prior is not None and drift.state:
        figures[f"{prefix}alpha"] = max((float(group["alpha"]) for group in drift.param_groups), key=abs)
        figures[f"{prefix}bound"] = len(drift.covered_names)
        figures[f"{prefix}biased"] = len(drift.biased_names)
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
