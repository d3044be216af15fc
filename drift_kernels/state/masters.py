"""Master weights: a bfloat16 parameter and its residual as one float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.rounding import join
from ..sharding import local, wrap
from .precision import RESIDUAL


def master_weight(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The float32 master of a parameter, in memory of its own, sharded as the parameter is; where its state has no
    residual yet, of the parameter itself."""
    residual = state.get(RESIDUAL)
    own = local(param.detach())
    return wrap(own.to(torch.float32, copy=True) if residual is None else join(own, local(residual)), param)


def refresh_masters(states: Iterable[Mapping[str, Any]]) -> None:
    """Makes the parameters as they are the masters."""
    for state in states:
        if RESIDUAL in state:
            local(state[RESIDUAL]).zero_()
