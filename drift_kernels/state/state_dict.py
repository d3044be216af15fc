"""Saving and loading optimizer states; state_dicts are interchangeable with those of torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from ..errors import PriorMismatchError
from ..sharding import Reduction, Shard, local, local_pairs, part_for, wrap
from .arrangement import ParamGroups, arranged
from .param_groups import FINGERPRINT, named_params
from .precision import KEPT, OWN, Precision, check_state, has_begun, with_keys_of_codes


def only_asks_for_states(param_groups: list[dict[str, Any]]) -> bool:
    """Whether a first step only serves to create states: the learning rate is 0 and all gradients are zero.

    torch.distributed.checkpoint makes such a step before it loads; a prior must leave no trace in those states.
    """
    if not all(isinstance(lr, (int, float, Tensor)) and lr == 0 for lr in (group["lr"] for group in param_groups)):
        return False
    params = [param for group in param_groups for param in group["params"]]
    grads = local_pairs(params, [param.grad for param in params])[1]
    found = [0.0 if grad is None or not grad.numel() else float(grad.detach().abs().max()) for grad in grads]
    return not Reduction([Shard.of(param) for param in params]).any_of(found, local(params[0]).device)


def check_state_dict(
    state_dict: StateDict, param_groups: ParamGroups, fingerprint: str | None, plain: Callable[[str], str]
) -> dict[str, Any]:
    """Check `state_dict` and return a shallow copy in the order and with the groups of `param_groups`.

    torch then loads the copy by position. Groups keep their current value of whatever the saved ones lack.

    Args:
        plain: maps a parameter's name to its name without what wrappers add to it.

    Raises:
        PriorMismatchError: If it was saved with another prior.
        ValueError: If it does not fit the parameters, or is not the state of an AdamW without amsgrad.
    """
    saved_groups = state_dict["param_groups"]
    for index, saved in enumerate(saved_groups):
        if saved.get(FINGERPRINT) not in (None, fingerprint):
            raise PriorMismatchError(
                f"the state_dict was saved with the prior {saved[FINGERPRINT][:12]}, but this optimizer has "
                f"{'none' if fingerprint is None else fingerprint[:12]} (group {index}); to resume with a different "
                f"prior on purpose, remove {FINGERPRINT!r} from the param groups of the state_dict"
            )
        if saved.get("amsgrad"):
            raise ValueError(f"the state_dict was saved with amsgrad, which is not supported (group {index})")
    groups = arranged(param_groups, saved_groups, plain)
    states = dict(state_dict["state"])
    for saved_id, (name, param) in _params_by_saved_id(param_groups, groups).items():
        if has_begun(states.get(saved_id, {})):
            states[saved_id] = with_keys_of_codes(states[saved_id])
            check_state(name, param, states[saved_id])
        elif states.get(saved_id) and not any("betas" in saved for saved in saved_groups):
            keys = ", ".join(map(str, states[saved_id]))
            raise ValueError(f"the state of parameter {name} has {keys} but no exp_avg: not a state of AdamW")
    return {**state_dict, "state": states, "param_groups": groups}


def _params_by_saved_id(param_groups: ParamGroups, saved_groups: ParamGroups) -> dict[Any, tuple[str, Tensor]]:
    """Map the parameter ids of a state_dict in matching order to the parameters and their names."""
    ids = [saved_id for group in saved_groups for saved_id in group["params"]]
    return dict(zip(ids, named_params(param_groups), strict=True))


def restore_states(optimizer: Optimizer, state_dict: StateDict, precision: Precision) -> None:
    """Set the states from `state_dict` again, in the given precision, because torch cast them while loading. Anything
    else in `optimizer.state` stays as torch loaded it."""
    for saved_id, (_, param) in _params_by_saved_id(optimizer.param_groups, state_dict["param_groups"]).items():
        saved = state_dict["state"].get(saved_id, {})
        if has_begun(saved):
            others = {key: value for key, value in optimizer.state[param].items() if key not in OWN}
            for key in KEPT.intersection(saved):
                own = part_for(param, saved[key]).to(local(param).device, saved[key].dtype, copy=True)
                others[key] = wrap(own, param)
            optimizer.state[param] = {**precision.restored_state(param, saved), **others}
