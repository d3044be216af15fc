"""Steps inside the backward pass: each parameter is updated as soon as its gradient is there, and the gradient freed.

So no more than a few gradients are in memory at once. The coefficients of all parameters are filled at the first
gradient of a backward pass, in the table that `step()` uses; each parameter has a plan of its own for its launches.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..kernels.coefficients import GradScale, Hyperparameters
from ..kernels.plan import Plan
from ..sharding import is_sharded
from .eager import not_compiled
from .hyperparameters import check_grad, hyperparameters
from .launches import BatchCache, DeviceBatch, Launch, Slot


@dataclass(frozen=True)
class _Single:
    """One parameter of a batch: a plan for it alone, and its row of the batch's table."""

    batch: DeviceBatch
    launch: Launch
    slot: Slot
    plan: Plan
    row: slice

    def update(self, grad: Tensor, groups: list[Hyperparameters]) -> None:
        backend, coefficients = self.batch.backend, self.batch.coefficients
        self.plan.set_grads([grad])
        if self.launch.needs_stats(groups):
            with_delta = self.launch.biased(groups, decoupled=False)
            backend.grad_stats(self.plan, coefficients.stats[self.row], with_delta=with_delta)
            coefficients.set_gradient_coefficients(coefficients.bias(with_stats=True), None)
        table = coefficients.table[self.row]
        backend.update(self.plan, table, with_delta=self.launch.biased(groups, decoupled=True))
        self.slot.state["step"] += 1
        self.plan.release_grads()


class BackwardHandle:
    """What `attach_to_backward` returns.

    From the first gradient of a backward pass to its last, hyperparameters are what they were at the first.
    """

    def __init__(self, optimizer: StepInBackward) -> None:
        self._optimizer = optimizer
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._groups: list[Hyperparameters] | None = None  # of the backward pass that is going on
        self._updated: set[int] = set()  # the parameters that it has updated, by id
        self._batches: list[DeviceBatch] = []  # those that `_singles` are of
        self._singles: dict[int, _Single] = {}
        self._params = [p for p in optimizer._params() if p.requires_grad]
        self._hooks: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._update) for p in self._params]

    def remove(self) -> None:
        """Ends it: gradients stay after a backward pass, and `step()` updates. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None

    def finish(self, grad_scale: GradScale) -> None:
        """What `step()` does meanwhile: it ends the pass, and raises RuntimeError if it would have had work."""
        self._groups = None
        if any(value is not None for value in grad_scale):
            raise RuntimeError(
                "a GradScaler looks at all gradients before it steps; with attach_to_backward() each is gone by then"
            )
        for name, param in self._optimizer._named_params():
            if param.grad is not None:
                raise RuntimeError(
                    f"parameter {name} has a gradient that no backward pass has used: while the optimizer is attached "
                    "to it, step() updates nothing; remove() the handle, or attach anew if the parameter is new"
                )

    @not_compiled
    @torch.no_grad()
    def _update(self, param: Tensor) -> None:
        """The hook: the parameter's gradient is complete."""
        grad = param.grad
        if grad is None:
            return
        with self._lock:
            if self._groups is None or id(param) in self._updated:
                self._groups = self._begin()
            single = self._singles[id(param)]
            check_grad(single.slot.name, param, grad)
            if grad.dtype != single.plan.grad_dtype:
                single = _Single(
                    single.batch, single.launch, single.slot, Plan([single.slot.operands], grad.dtype), single.row
                )
                self._singles[id(param)] = single
            single.update(grad, self._groups)
            self._updated.add(id(param))
        torch.autograd.graph.increment_version(param)
        param.grad = None

    def _begin(self) -> list[Hyperparameters]:
        """The coefficients of every parameter's next step, of which none is counted yet."""
        optimizer = self._optimizer
        groups = [hyperparameters(group, index) for index, group in enumerate(optimizer.param_groups)]
        params, hooked = optimizer._params(), {id(p) for p in self._params}
        # In place of the gradients that are still to come: of the same dtypes.
        stand_ins: list[Tensor | None] = [p.detach() if id(p) in hooked else None for p in params]
        optimizer._set_grads(params, stand_ins)
        for batch in optimizer._cache.batches:
            batch.release_grads()
            batch.advance(groups)
            batch.coefficients.steps -= 1
            batch.coefficients.set_gradient_coefficients(batch.coefficients.bias(with_stats=False), None)
        if self._batches is not optimizer._cache.batches:
            self._batches = optimizer._cache.batches
            self._singles = {id(single.slot.param): single for single in _singles(self._batches)}
        self._updated.clear()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        return groups

    def _end(self) -> None:
        self._groups = None


def _singles(batches: list[DeviceBatch]) -> list[_Single]:
    return [
        _Single(batch, launch, slot, Plan([slot.operands], slot.grad_dtype), slice(row, row + 1))
        for batch in batches
        for launch in batch.launches
        for row, slot in zip(range(launch.rows.start, launch.rows.stop), batch.slots[launch.rows], strict=True)
    ]


class StepInBackward:
    """Part of FusedDriftAdamW."""

    max_grad_norm: float | None
    param_groups: list[dict[str, Any]]
    _cache: BatchCache
    _in_backward: BackwardHandle | None = None

    def attach_to_backward(self) -> BackwardHandle:
        """From now on `loss.backward()` updates each parameter as soon as its gradient is complete, and sets the
        gradient to None: the memory of all gradients falls to that of the few which are not used yet.

        The updates are those of `step()` after the backward pass, bit for bit. `step()` itself then changes nothing, so
        training loops, trainers and schedulers stay as they are; it raises RuntimeError under a GradScaler, and for a
        gradient that did not come by a backward pass. Every backward pass is a step: gradients cannot be accumulated
        over several. A parameter that is used more than once gets one update (but not under reentrant checkpointing,
        which completes its gradient piece by piece). For the parameters that require gradients now, all of which get
        states at the first pass; it ends with the returned handle's `remove()`.

        Raises:
            ValueError: `max_grad_norm` is set (the norm of all gradients would be known too late), or several processes
                train together, since their gradients are reduced after this.
            RuntimeError: it is attached already.
        """
        if self.max_grad_norm is not None:
            raise ValueError(
                "attach_to_backward() updates parameters before the norm of all gradients is known: max_grad_norm must "
                f"be None, got {self.max_grad_norm}"
            )
        distributed = torch.distributed
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several or any(map(is_sharded, self._params())):
            raise ValueError(
                "attach_to_backward() is for a single process: gradients are not reduced yet when they are used"
            )
        if self._in_backward is not None:
            raise RuntimeError("the optimizer is attached to the backward pass already: remove() its handle first")
        self._in_backward = BackwardHandle(self)
        return self._in_backward

    def _params(self) -> list[Tensor]:
        raise NotImplementedError

    def _named_params(self) -> list[tuple[str, Tensor]]:
        raise NotImplementedError

    def _set_grads(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        raise NotImplementedError
