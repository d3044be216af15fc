"""The figures of the last step, as trainers log them."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from ..prior.names import MODULES
from .in_use import unwrap_optimizer


def step_figures(optimizer: Any, prefix: str = "prior/") -> dict[str, float]:
    """What the last step did, for a log; reading it waits for the device.

    - `prior/alpha`, the strength as it is now; where param groups differ, the largest.
    - `prior/bound`, how many parameters the prior covers, and `prior/biased`, how many of them it biased: those that
      had a gradient, while alpha was not 0.
    - `prior/grad_norm`, the norm of the whole biased gradient, where the optimizer has a `max_grad_norm`.
    - For each module group that the prior reached (attn, mlp, norm, embed, head, other) `prior/cosine/attn`, the mean
      over its tensors of cos(gradient, delta), and `prior/ratio/attn`, that of norm(bias)/norm(gradient), where the
      step needed gradient statistics.

    Without a prior there is `grad_norm` alone, before the first step nothing.
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
