"""Param groups that keep the parameters' names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def named_groups(model: nn.Module, weight_decay: float = 1e-2) -> Iterator[dict[str, Any]]:
    """Yield the model's trainable parameters, with their names, in two param groups: those of two or more dimensions
    with weight decay, and biases and norms without.

    The model is read when the optimizer takes the groups, so after everything that has frozen or added parameters.

    Example::

        optimizer = FusedDriftAdamW(named_groups(model), lr=1e-6, prior="prior")

    Args:
        model: the model that is trained.
        weight_decay: of the parameters of two or more dimensions.

    Yields:
        Param groups; an empty one is left out.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for decays in (True, False):
        if params := [(name, param) for name, param in trainable if (param.ndim > 1) == decays]:
            yield {"params": params, "weight_decay": weight_decay if decays else 0.0}
