"""Master weights: a bfloat16 parameter and its residual as one float32."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from ..formats.rounding import join
from ..sharding import local, wrap
from .precision import RESIDUAL, Precision


class Masters:
    """Part of FusedDriftAdamW."""

    precision: Precision
    state: defaultdict[Tensor, Any]

    def _params(self) -> list[Tensor]:
        raise NotImplementedError

    def master_weight(self, param: Tensor) -> Tensor:
        """The float32 master of a parameter, in memory of its own: of the parameter itself before the first step.

        Raises ValueError without master weights, and KeyError for a parameter that is not this optimizer's.
        """
        if not self.precision.master_weights:
            raise ValueError("there are no masters: the optimizer was built without master_weights=True")
        if not any(param is own for own in self._params()):
            raise KeyError("the parameter is not one of this optimizer's")
        residual = self.state[param].get(RESIDUAL) if param in self.state else None
        own = local(param.detach())
        return wrap(own.float() if residual is None else join(own, local(residual)), param)

    def refresh_masters(self) -> None:
        """Makes the parameters as they are the masters: to be called after writing to parameters directly."""
        for state in self.state.values():
            if RESIDUAL in state:
                local(state[RESIDUAL]).zero_()
