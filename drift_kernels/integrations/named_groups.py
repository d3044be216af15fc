"""Param groups that keep the parameters' names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def named_groups(model: nn.Module, weight_decay: float = 1e-2) -> Iterator[dict[str, Any]]:
    """The trainable parameters in two param groups with their names: those of two or more dimensions with the weight
    decay, biases and norms without.

    The model is looked at when the optimizer takes the groups, after whatever has frozen or added parameters.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for decays in (True, False):
        if params := [(name, param) for name, param in trainable if (param.ndim > 1) == decays]:
            yield {"params": params, "weight_decay": weight_decay if decays else 0.0}
