"""Steps inside the backward pass: each parameter is updated as soon as its gradient is ready, and the gradient freed.

So only a few gradients are in memory at a time. The coefficients of all parameters are filled at the first gradient of
a backward pass, in the table that `step()` uses; each parameter has a separate plan for its launches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from ..kernels.coefficients import UNSCALED, GradScale, Hyperparameters
from ..kernels.plan import Plan
from ..sharding import is_sharded
from ..state.param_groups import named_params
from ..torch_private import at_end_of_backward, not_compiled
from .engine import Engine, StepTensors
from .hyperparameters import check_grad, hyperparameters
from .launches import DeviceBatch, Launch, Slot


@dataclass(frozen=True)
class _Single:
    """One parameter of a batch: a plan for it alone, and its row in the batch's table."""

    batch: DeviceBatch
    launch: Launch
    slot: Slot
    plan: Plan
    row: slice
    step: Tensor  # its step count

    def update(self, param: Tensor, state: dict[str, Any], grad: Tensor, groups: list[Hyperparameters]) -> None:
        coefficients = self.batch.coefficients
        if self.batch.backend.READS_TENSORS:
            self.plan.operands = [self.slot.operands(param, state)]
        self.plan.set_grads([grad])
        if self.launch.needs_stats(groups):
            self.batch.measure(self.plan, self.row, self.launch, groups)
            coefficients.set_gradient_coefficients(coefficients.bias(with_stats=True), None)
        self.slot.copy_in(param)
        self.batch.run(self.plan, self.row, self.launch, groups)
        self.slot.copy_out(param)
        self.step.add_(1)
        self.plan.release()


class BackwardHandle:
    """The handle that `attach_to_backward` returns.

    A backward pass uses the hyperparameters from the time of its first gradient.
    """

    def __init__(self, optimizer: Optimizer, engine: Engine) -> None:
        self._optimizer = optimizer
        self._engine = engine
        self._lock = threading.Lock()  # autograd uses one thread per device
        self._groups: list[Hyperparameters] | None = None  # of the current backward pass
        self._updated: set[int] = set()  # the ids of the parameters that it has updated
        self._batches: list[DeviceBatch] = []  # the batches that `_singles` belong to
        self._singles: dict[int, _Single] = {}
        self._params = [p for _, p in named_params(optimizer.param_groups) if p.requires_grad]
        self._hooks: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._update) for p in self._params]

    @property
    def attached(self) -> bool:
        """Whether backward passes update parameters: True until `remove()`."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Stop updating in the backward pass: gradients are kept, and `step()` updates. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._batches, self._singles = [], {}

    def finish(self, grad_scale: GradScale) -> None:
        """End the backward pass; `step()` calls this while attached. Raises RuntimeError if work is left for a step."""
        self._groups = None
        if any(value is not None for value in grad_scale):
            raise RuntimeError(
                "GradScaler cannot be combined with attach_to_backward(): it inspects all gradients before the step, "
                "but they have already been freed"
            )
        for name, param in named_params(self._optimizer.param_groups):
            if param.grad is not None:
                raise RuntimeError(
                    f"parameter {name} has a gradient that no backward pass has used: step() updates nothing while the "
                    "optimizer is attached to the backward pass; remove() the handle, and attach again if the "
                    "parameter is new"
                )

    @not_compiled
    @torch.no_grad()
    def _update(self, param: Tensor) -> None:
        """The hook that runs when the parameter's gradient is complete."""
        grad = param.grad
        if grad is None:
            return
        with self._lock:
            if self._groups is None or id(param) in self._updated:
                self._groups = self._begin()
            single = self._singles[id(param)]
            check_grad(single.slot.name, param, grad)
            state = self._optimizer.state[param]
            if grad.dtype != single.plan.grad_dtype:
                single = replace(single, plan=Plan([single.slot.operands(param, state)], grad.dtype))
                self._singles[id(param)] = single
            single.update(param, state, grad, self._groups)
            self._updated.add(id(param))
        torch.autograd.graph.increment_version(param)
        param.grad = None

    def _begin(self) -> list[Hyperparameters]:
        """Fill the coefficients of the next step of all parameters, without counting the step yet."""
        engine, param_groups = self._engine, self._optimizer.param_groups
        groups = [hyperparameters(group, index) for index, group in enumerate(param_groups)]
        params, hooked = [p for group in param_groups for p in group["params"]], {id(p) for p in self._params}
        # Placeholders of the same dtypes for the gradients that are still to come.
        stand_ins: list[Tensor | None] = [p.detach() if id(p) in hooked else None for p in params]
        engine.prepare(param_groups, StepTensors(params, params, stand_ins), self._optimizer.state)
        engine.renew(groups, params)
        for batch in engine.batches:
            batch.release()
            batch.begin(groups, UNSCALED)
            batch.coefficients.steps -= 1
            batch.coefficients.set_gradient_coefficients(batch.coefficients.bias(with_stats=False), None)
        if self._batches is not engine.batches:
            self._batches = engine.batches
            self._singles = {id(params[single.slot.index]): single for single in self._make_singles(params)}
        self._updated.clear()
        at_end_of_backward(self._end)
        return groups

    def _make_singles(self, params: list[Tensor]) -> Iterator[_Single]:
        for batch in self._batches:
            for launch in batch.launches:
                for row, slot in zip(range(launch.rows.start, launch.rows.stop), batch.slots[launch.rows], strict=True):
                    param = params[slot.index]
                    plan = Plan([slot.operands(param, self._optimizer.state[param])], launch.plan.grad_dtype)
                    plan.release()
                    yield _Single(batch, launch, slot, plan, slice(row, row + 1), batch.coefficients.steps[row])

    def _end(self) -> None:
        self._groups = None


def attach(optimizer: Optimizer, engine: Engine) -> BackwardHandle:
    """Implement `FusedDriftAdamW.attach_to_backward`, which has the documentation.

    Raises ValueError if gradients change after the backward pass has computed them.
    """
    if engine.max_grad_norm is not None:
        raise ValueError(
            "attach_to_backward() updates parameters before the norm of all gradients is known: max_grad_norm must "
            f"be None, got {engine.max_grad_norm}"
        )
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several or any(is_sharded(param) for _, param in named_params(optimizer.param_groups)):
        raise ValueError(
            "attach_to_backward() supports a single process only: it would use gradients before they are reduced"
        )
    named = named_params(optimizer.param_groups)
    if len({id(param) for _, param in named}) < len(named):
        raise ValueError(
            "attach_to_backward() does not support a parameter that was passed twice: step() would update it twice, "
            "but the backward pass only once"
        )
    return BackwardHandle(optimizer, engine)
