"""Checks of states in use: one that was set or moved by hand must be usable by the kernels, or raises an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..sharding import local, wrap
from .precision import CODES, OPERANDS, STATES, check_state


def check_live_state(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the parameter, if its state has the wrong shape, dtype or device."""
    check_state(name, param, state)
    own = local(param)
    for key in OPERANDS:
        if key in state and local(state[key]).device != own.device:
            where = local(state[key]).device
            raise ValueError(
                f"the state {key} of parameter {name} is on {where}, but the parameter is on {own.device}: move the "
                "state"
            )
    dtypes = {torch.int8 if CODES[key] in state else state[key].dtype for key in STATES}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.int8}:
        raise ValueError(
            f"the states {' and '.join(STATES)} of parameter {name} are {' and '.join(sorted(map(str, dtypes)))}; "
            "expected both torch.float32 or both torch.bfloat16, or codes with their scales"
        )


def make_contiguous(state: dict[str, Any]) -> None:
    """Replace non-contiguous tensors with contiguous copies: torch gives states the strides of their parameters."""
    for key in OPERANDS:
        if key in state and not local(state[key]).is_contiguous():
            state[key] = wrap(local(state[key]).contiguous(), state[key])
