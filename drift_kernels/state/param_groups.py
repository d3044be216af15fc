"""Param groups: the names of their parameters, and what they carry in a state_dict beside hyperparameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# The key of the seed of stochastic rounding.
SEED = "seed"

# The key of the prior's fingerprint (None without a prior).
FINGERPRINT = "prior_fingerprint"


def param_name(group: dict[str, Any], index: int, i: int) -> str:
    """The name of parameter `i` of param group number `index`: its own, or its position where the group has none."""
    names = group.get("param_names")
    return names[i] if names else f"{i} of group {index}"


def named_params(param_groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """Every parameter of the groups, in order, with its name."""
    return [
        (param_name(group, index, i), param)
        for index, group in enumerate(param_groups)
        for i, param in enumerate(group["params"])
    ]
