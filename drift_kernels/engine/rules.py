"""What an engine does to each tensor: one step of AdamW, or the bias of its gradient alone.

Another update rule is another class here, over a primitive of the backends and coefficients of its own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.backends import Backend
from ..kernels.plan import Plan
from ..sharding import local
from ..state.live import check_live_state, make_contiguous
from ..state.precision import Precision, has_begun
from .hyperparameters import check_dtype, check_memory, check_param

State = dict[str, Any]


class Rule(Protocol):
    writes_grads: bool  # it changes gradients, and not parameters
    advances: bool  # its steps are counted, and have AdamW's coefficients
    reads_decoupled: bool  # it has a use for a delta that does not bias the gradient
    counts_on_device: bool  # step counts live on their parameters' device, as those of capturable groups do

    def check(self, name: str, param: Tensor) -> None:
        """Raises TypeError or ValueError, naming the parameter, for one that it cannot take."""

    def at_random(self, param: Tensor) -> bool:
        """Whether it rounds at random, so that the parameter needs a key and its place."""

    def state_of(self, states: Any, param: Tensor) -> State:
        """The state of a parameter in `states`, made if it has none yet."""

    def check_state(self, name: str, states: Any, param: Tensor) -> None:
        """Raises TypeError or ValueError, naming the parameter, for a state in `states` that is not one of it."""

    def steps_device(self, param: Tensor, group: dict[str, Any]) -> torch.device:
        """Where a parameter's step count lives."""

    def run(self, backend: Backend, plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
        """One launch, with the rows of the coefficients that are the plan's."""


class AdamW:
    """`reference.drift_adamw_`, on parameters and states that are held as `precision` says."""

    writes_grads = False
    advances = True
    reads_decoupled = True

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.counts_on_device = False

    def check(self, name: str, param: Tensor) -> None:
        check_param(name, local(param))
        self.precision.check_param(name, param)

    def at_random(self, param: Tensor) -> bool:
        return self.precision.at_random(param)

    def state_of(self, states: Any, param: Tensor) -> State:
        state: State = states[param]
        if not has_begun(state):
            state.update(self.precision.new_state(param))
        make_contiguous(state)
        return state

    def check_state(self, name: str, states: Any, param: Tensor) -> None:
        if has_begun(states.get(param, {})):
            check_live_state(name, param, states[param])
            for key, value in states[param].items():
                if isinstance(value, Tensor):
                    check_memory(f"the state {key} of parameter {name}", local(value))

    def steps_device(self, param: Tensor, group: dict[str, Any]) -> torch.device:
        return param.device if self.counts_on_device or group["capturable"] else torch.device("cpu")

    def run(self, backend: Backend, plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
        backend.update(plan, coefficients, with_delta=with_delta)


class Bias:
    """`reference.bias_`: gradients are biased in place, for whatever optimizer comes next."""

    writes_grads = True
    advances = False
    reads_decoupled = False
    counts_on_device = False

    def check(self, name: str, param: Tensor) -> None:
        check_dtype(name, param)

    def at_random(self, param: Tensor) -> bool:
        return False

    def state_of(self, states: Any, param: Tensor) -> State:
        return {}

    def check_state(self, name: str, states: Any, param: Tensor) -> None:
        pass

    def steps_device(self, param: Tensor, group: dict[str, Any]) -> torch.device:
        return torch.device("cpu")

    def run(self, backend: Backend, plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
        backend.bias(plan, coefficients)
        plan.write_back()
