"""The update rules of an engine: one step of AdamW, or only the bias of the gradient.

To add an update rule, add a class here, with its own backend primitive and coefficients.
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
    writes_grads: bool  # it changes gradients instead of parameters
    advances: bool  # its steps are counted, and use AdamW's coefficients
    reads_decoupled: bool  # it uses deltas that do not bias gradients
    counts_on_device: bool  # step counts are on the device of their parameters, as in capturable groups

    def check(self, name: str, param: Tensor) -> None:
        """Raise TypeError or ValueError, naming the parameter, if it is not supported."""

    def at_random(self, param: Tensor) -> bool:
        """Whether it uses stochastic rounding, which needs a key and the parameter's place."""

    def state_of(self, states: Any, param: Tensor) -> State:
        """Return the state of a parameter in `states`; create it if there is none yet."""

    def check_state(self, name: str, states: Any, param: Tensor) -> None:
        """Raise TypeError or ValueError, naming the parameter, if its state in `states` does not fit it."""

    def steps_device(self, param: Tensor, group: dict[str, Any]) -> torch.device:
        """The device of a parameter's step count."""

    def run(self, backend: Backend, plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
        """Launch the update once, with the plan's rows of the coefficients."""


class AdamW:
    """`reference.drift_adamw_`, on parameters and states in the given precision."""

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
    """`reference.bias_`: biases gradients in place, for any optimizer to use."""

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
