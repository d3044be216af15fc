"""Master weights: a bfloat16 parameter and its residual, which together are one float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.rounding import join
from ..sharding import local, wrap
from .precision import RESIDUAL


def master_weight(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return the float32 master weight of a parameter as a new tensor, sharded like the parameter; if its state has no
    residual yet, the parameter in float32."""
    residual = state.get(RESIDUAL)
    own = local(param.detach())
    return wrap(own.to(torch.float32, copy=True) if residual is None else join(own, local(residual)), param)


def refresh_masters(states: Iterable[Mapping[str, Any]]) -> None:
    """Reset the master weights to the current values of the parameters."""
    for state in states:
        if RESIDUAL in state:
            local(state[RESIDUAL]).zero_()
