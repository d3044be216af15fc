"""Param groups: the names of their parameters, and what they store in a state_dict besides hyperparameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import PriorError

# Key of the seed for stochastic rounding.
SEED = "seed"

# Key of the prior's fingerprint (None without a prior).
FINGERPRINT = "prior_fingerprint"

# Key of the number of steps since the deltas of adapters were renewed, if they are not renewed in every step.
TURN = "prior_turn"


def names_of(group: dict[str, Any]) -> list[str] | None:
    """The names of a group's parameters; None if there are none, or too few or too many (a list edited by hand)."""
    params, names = group["params"], group.get("param_names")
    if names is None:
        return None if params else []
    return list(names) if len(names) == len(params) else None


def labels(group: dict[str, Any], index: int) -> list[str]:
    """How messages refer to the parameters of param group `index`: by name, or else by position."""
    return names_of(group) or [f"{i} of group {index}" for i in range(len(group["params"]))]


def named_params(param_groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """All parameters of the groups, in order, each with its name."""
    return [
        (name, param)
        for index, group in enumerate(param_groups)
        for name, param in zip(labels(group, index), group["params"], strict=True)
    ]


def check_names(group: dict[str, Any], index: int) -> None:
    """Raise PriorError unless every parameter of the group has a name, by which a prior is bound."""
    if names_of(group) is not None:
        return
    count, names = len(group["params"]), group.get("param_names")
    if names is None:
        raise PriorError(
            "a prior is bound by parameter name, but these parameters have no names: "
            f"pass model.named_parameters() (group {index})"
        )
    raise PriorError(
        f"a prior is bound by parameter name, but group {index} has {len(names)} names for {count} parameters: add "
        "parameters with add_param_group({'params': [(name, param)]}), or keep group['param_names'] in step with "
        "group['params']. DeepSpeed's ZeRO flattens parameters, which loses their names: call "
        "attach_prior(model, prior) before it, and use any other optimizer"
    )
