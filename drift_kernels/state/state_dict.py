"""Optimizer states in and out of a state_dict, compatible both ways with torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from ..errors import PriorMismatchError
from ..sharding import Reduction, Shard, local, local_pairs
from .param_groups import FINGERPRINT, named_params
from .precision import Precision, check_state


def only_asks_for_states(param_groups: list[dict[str, Any]]) -> bool:
    """Whether a first step only asks for states: at a learning rate of 0, on gradients of zeros.

    So does torch.distributed.checkpoint before it loads; a prior must leave no trace in those states.
    """
    if not all(isinstance(lr, (int, float, Tensor)) and lr == 0 for lr in (group["lr"] for group in param_groups)):
        return False
    params = [param for group in param_groups for param in group["params"]]
    grads = local_pairs(params, [param.grad for param in params])[1]
    found = [0.0 if grad is None or not grad.numel() else float(grad.detach().abs().max()) for grad in grads]
    return not Reduction([Shard.of(param) for param in params]).any_of(found, local(params[0]).device)


def _params_by_saved_id(
    param_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]
) -> dict[Any, tuple[str, Tensor]]:
    """What a state_dict's parameter ids mean here: the parameters in order, with their names."""
    ids = [saved_id for group in saved_groups for saved_id in group["params"]]
    return dict(zip(ids, named_params(param_groups), strict=True))


def check_state_dict(
    state_dict: StateDict, param_groups: list[dict[str, Any]], fingerprint: str | None
) -> dict[str, Any]:
    """A shallow copy of `state_dict`, checked, whose groups take what they lack from `param_groups`.

    Raises:
        PriorMismatchError: it was saved under another prior.
        ValueError: it does not fit the parameters, or is not of an AdamW without amsgrad.
    """
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (param_groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(f"the state_dict has param groups of sizes {saved_sizes}, this optimizer of sizes {sizes}")
    for index, saved in enumerate(saved_groups):
        if saved.get(FINGERPRINT) not in (None, fingerprint):
            raise PriorMismatchError(
                f"the state_dict was saved under the prior {saved[FINGERPRINT][:12]}, this optimizer has "
                f"{'none' if fingerprint is None else fingerprint[:12]} (group {index}); to go on with another prior "
                f"on purpose, remove {FINGERPRINT!r} from its param groups"
            )
        if saved.get("amsgrad"):
            raise ValueError(f"the state_dict was saved with amsgrad, which is not supported (group {index})")
    params = _params_by_saved_id(param_groups, saved_groups)
    for saved_id, state in state_dict["state"].items():
        if saved_id in params and state:
            check_state(*params[saved_id], state)
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, **saved}
        for group, saved in zip(param_groups, saved_groups, strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def restore_states(optimizer: Optimizer, state_dict: StateDict, precision: Precision) -> None:
    """Sets the states from `state_dict` again, as `precision` holds them, after torch's loading cast them."""
    for saved_id, (_, param) in _params_by_saved_id(optimizer.param_groups, state_dict["param_groups"]).items():
        if optimizer.state.get(param):
            optimizer.state[param] = precision.restored_state(param, state_dict["state"][saved_id])
