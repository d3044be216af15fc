"""Param groups: the names of their parameters, and what they carry in a state_dict beside hyperparameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import PriorError

# The key of the seed of stochastic rounding.
SEED = "seed"

# The key of the prior's fingerprint (None without a prior).
FINGERPRINT = "prior_fingerprint"

# The key of the steps since the deltas of adapters were renewed, where that is not done in every step.
TURN = "prior_turn"


def names_of(group: dict[str, Any]) -> list[str] | None:
    """The names of a group's parameters; None if it has none, or not one for each (a list edited by hand)."""
    params, names = group["params"], group.get("param_names")
    if names is None:
        return None if params else []
    return list(names) if len(names) == len(params) else None


def labels(group: dict[str, Any], index: int) -> list[str]:
    """What messages call the parameters of param group number `index`: their names, or their positions."""
    return names_of(group) or [f"{i} of group {index}" for i in range(len(group["params"]))]


def named_params(param_groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """Every parameter of the groups, in order, with its name."""
    return [
        (name, param)
        for index, group in enumerate(param_groups)
        for name, param in zip(labels(group, index), group["params"], strict=True)
    ]


def check_names(group: dict[str, Any], index: int) -> None:
    """Raises PriorError for a group whose parameters have not each a name, by which a prior could be bound."""
    if names_of(group) is not None:
        return
    count, names = len(group["params"]), group.get("param_names")
    if names is None:
        raise PriorError(
            "a prior is bound by parameter names, and these parameters have none: "
            f"pass model.named_parameters() (group {index})"
        )
    raise PriorError(
        f"a prior is bound by parameter names, and group {index} has {len(names)} names for {count} parameters: add "
        "parameters by add_param_group({'params': [(name, param)]}), or keep group['param_names'] in step with "
        "group['params']. Where DeepSpeed's ZeRO has made one of many, there are no names any more: "
        "attach_prior(model, prior) before it, and any other optimizer"
    )
