"""States in use: whoever puts one into `optimizer.state` by hand, or moves one, gets what kernels can work on, or an
error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..sharding import local, wrap
from .precision import OPERAND_STATES, STATES, check_state


def check_live_state(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the parameter, for a state of another shape, dtype or device than it takes."""
    check_state(name, param, state)
    held = {key: local(state[key]) for key in OPERAND_STATES.values() if key in state}
    own = local(param)
    for key, tensor in held.items():
        if tensor.device != own.device:
            raise ValueError(
                f"the state {key} of parameter {name} is on {tensor.device}, the parameter on {own.device}: move it"
            )
    dtypes = {state[key].dtype for key in STATES if key in state}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) > 1 or floating - {torch.float32, torch.bfloat16}:
        found = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"the states {' and '.join(STATES)} of parameter {name} are {found}; expected both torch.float32 or both "
            "torch.bfloat16, or codes with their scales"
        )


def make_contiguous(state: dict[str, Any]) -> None:
    """Puts contiguous copies in the place of what is not: torch's states have the strides of their parameters."""
    for key in OPERAND_STATES.values():
        if key in state and not local(state[key]).is_contiguous():
            state[key] = wrap(local(state[key]).contiguous(), state[key])
