"""Checks at the start of training: the trainer steps a FusedDriftAdamW, and that biases gradients."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch.distributed as dist

from ..engine.reach import all_frozen
from ..optimizer import FusedDriftAdamW
from ..state.param_groups import named_params

logger = logging.getLogger("drift_kernels")


def unwrap_optimizer(optimizer: Any) -> FusedDriftAdamW:
    """Return the `FusedDriftAdamW` inside a trainer's wrapper (Accelerate, Lightning).

    Args:
        optimizer: a `FusedDriftAdamW`, or an object whose attribute `optimizer` leads to one.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, FusedDriftAdamW) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, FusedDriftAdamW):
        raise TypeError(
            f"expected a FusedDriftAdamW or a wrapper of one, got {_kind(optimizer)}: the trainer would train without "
            "the prior"
        )
    return inner


def check_in_use(optimizer: Any, trainer_clips: float | None = None) -> FusedDriftAdamW:
    """Check the optimizer at the start of training. The log lists what the prior acts on; it warns if there is no
    prior, if alpha is 0, and if both the trainer and the optimizer clip.

    Args:
        optimizer: the trainer's optimizer: a `FusedDriftAdamW`, or a wrapper of one.
        trainer_clips: the norm to which the trainer clips the gradient; 0 or None if it does not.

    Returns:
        The `FusedDriftAdamW`.

    Raises:
        TypeError: it is another optimizer.
        PriorError: its current parameters do not fit the prior, are all frozen, or have lost their names.
    """
    drift = unwrap_optimizer(optimizer)
    covered, first = drift.covered_names, not (dist.is_available() and dist.is_initialized() and dist.get_rank())
    if trainer_clips and drift.max_grad_norm not in (None, math.inf):
        logger.warning(
            "gradients are clipped twice: the trainer clips the gradient to max_grad_norm=%g, then FusedDriftAdamW "
            "clips the biased gradient to max_grad_norm=%g; disable one of them",
            trainer_clips,
            drift.max_grad_norm,
        )
    group = drift.param_groups[0]
    if drift.prior is None:
        logger.warning("FusedDriftAdamW has no prior: this is plain fine-tuning")
        return drift
    trained = {name for name, param in named_params(drift.param_groups) if param.requires_grad}
    if trained.isdisjoint(covered):
        raise all_frozen(covered)
    if not any(float(group["alpha"]) for group in drift.param_groups):
        logger.warning("alpha is 0 at the start of training: until it changes, this is plain fine-tuning")
    if first:
        logger.info(
            "training starts with FusedDriftAdamW (backend %s): %d parameters with a delta, alpha=%g, prior_scaling=%r",
            drift.backend,
            len(covered),
            float(group["alpha"]),
            group["prior_scaling"],
        )
    return drift


def _kind(optimizer: Any) -> str:
    inner, kinds = optimizer, [type(optimizer).__name__]
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
        kinds.append(type(inner).__name__)
    return " around ".join(kinds)
