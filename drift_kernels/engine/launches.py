"""The work of one device in a step: the plans of its tensors, and their rows in one coefficient table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats.philox import Place
from ..kernels.backends import Backend
from ..kernels.coefficients import CoefficientTable, GradScale, Hyperparameters
from ..kernels.describe import Description
from ..kernels.filling import MAX_GROUPS, Filling
from ..kernels.operands import Operands
from ..kernels.plan import Plan
from ..sharding import Reduction, Shard, local
from ..state.precision import OPERANDS
from .binding import BoundDelta
from .rules import Rule


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Slot:
    """What stays the same from step to step for one parameter with a gradient. It holds no reference to the parameter
    or its state."""

    index: int  # among all parameters of the engine
    group: int
    name: str
    dtypes: tuple[str, ...]  # the same for all tensors of a plan
    bound: BoundDelta | None
    random_key: int | None  # for stochastic rounding
    place: Place
    shard: Shard | None
    copy: Tensor | None  # a contiguous copy for the kernels, if the parameter is not contiguous

    def operands(self, param: Tensor, state: dict[str, Any]) -> Operands:
        """The local tensors of the parameter and its state, and the delta."""
        tensors: dict[str, Any] = {name: local(state[key]) for key, name in OPERANDS.items() if key in state}
        if self.bound is not None:
            tensors |= {"delta": self.bound.delta, "delta_scale": self.bound.delta_scale}
        own = local(param) if self.copy is None else self.copy
        return Operands(own, **tensors, random_key=self.random_key, place=self.place)

    def copy_in(self, param: Tensor) -> None:
        if self.copy is not None:
            self.copy.copy_(local(param))

    def copy_out(self, param: Tensor) -> None:
        if self.copy is not None:
            local(param).copy_(self.copy)


@dataclass(frozen=True)
class Member:
    """A slot with its tensors, needed only while a batch is built."""

    slot: Slot
    param: Tensor
    grad_dtype: torch.dtype
    state: dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """A plan, its rows in the coefficient table, and the param group of each row."""

    plan: Plan
    rows: slice
    indices: list[int] | None  # among all parameters of the engine; None for all of them, in order
    of: Callable[[list[Any]], Sequence[Any]]  # selects the entries of this launch from a list over all parameters
    group_rows: list[tuple[int, slice]]

    def addresses_of(self, everything: bytes) -> bytes:
        """Select the addresses of this launch from those of all parameters, int64 each."""
        return everything if self.indices is None else np.frombuffer(everything, np.int64)[self.indices].tobytes()

    def reads_delta(self, groups: list[Hyperparameters], decoupled: bool) -> bool:
        """Whether the deltas are needed: to bias gradients or, with `decoupled`, to move parameters."""
        return self.plan.has_deltas and any(
            groups[group].acts if decoupled else groups[group].biases_gradients for group, _ in self.group_rows
        )

    def needs_stats(self, groups: list[Hyperparameters]) -> bool:
        return self.plan.has_deltas and any(groups[group].needs_stats for group, _ in self.group_rows)


def _runs(slots: list[Slot], rows: slice, key: Callable[[Slot], Any]) -> Iterator[slice]:
    """Yield the slices of consecutive slots with equal keys, within `rows`."""
    start = rows.start
    for stop in range(start + 1, rows.stop + 1):
        if stop == rows.stop or key(slots[stop]) != key(slots[start]):
            yield slice(start, stop)
            start = stop


def _share_steps(members: list[Member], device: torch.device) -> Tensor:
    """Return the step counts as one tensor, of which each state's `step` becomes a view: one operation advances all.

    A single count stays where it is, so that the batches of a parameter that was passed twice share it.
    """
    counts = [member.state.get("step", 0.0) for member in members]
    own = [torch.as_tensor(count, dtype=torch.float32, device=device) for count in counts]
    steps = own[0].reshape(1) if len(own) == 1 else torch.stack(own)
    for member, step in zip(members, steps, strict=True):
        if member.state:
            member.state["step"] = step
    return steps


class DeviceBatch:
    """The tensors of one device, ordered by plan, then by group.

    Args:
        members: at least one, with params, states and deltas on one device.
        count: the number of parameters of the engine.
        steps_device: the device of the step counts.
        rule: the update rule.
        backend: a backend for the device.

    Attributes:
        slots: the slot of each row.
        copied: the slots whose parameters are not contiguous.
        biased: the rows that have a delta.
        biased_rows: the same, int64 on the device.
        renewed: the rows whose delta is renewed.
    """

    def __init__(
        self, members: list[Member], count: int, steps_device: torch.device, rule: Rule, backend: Backend
    ) -> None:
        members = sorted(members, key=lambda member: (member.slot.dtypes, member.slot.group, member.slot.index))
        device = members[0].param.device
        self.backend = backend
        self.slots = [member.slot for member in members]
        self.launches = [
            self._launch(members[rows], rows, count)
            for rows in _runs(self.slots, slice(0, len(self.slots)), lambda slot: slot.dtypes)
        ]
        bounds = [slot.bound for slot in self.slots]
        self.coefficients = CoefficientTable(
            device,
            _share_steps(members, steps_device),
            [0.0 if bound is None else bound.delta_norm for bound in bounds],
            [0.0 if bound is None else bound.param_norm for bound in bounds],
            [1.0 if bound is None else bound.alpha for bound in bounds],
            alphas_change=any(bound is not None and bound.whole_norm is not None for bound in bounds),
        )
        self.biased = [row for row, bound in enumerate(bounds) if bound is not None]
        self.copied = [slot for slot in self.slots if slot.copy is not None]
        self.biased_rows = torch.tensor(self.biased, dtype=torch.int64, device=device)
        self.renewed = [row for row, bound in enumerate(bounds) if bound is not None and bound.norm is not None]
        self._renewed_rows = torch.tensor(self.renewed, dtype=torch.int64, device=device)
        alphas = [bound.alpha for bound in bounds if bound is not None and bound.norm is not None]
        self._alphas = torch.tensor(alphas, dtype=torch.float64, device=device)
        self._by_norms: tuple[tuple[bool, ...], Tensor] | None = None
        self._readers = {bound.readers for bound in bounds if bound is not None and bound.readers is not None}
        self._rule = rule
        self._reduction = Reduction([slot.shard for slot in self.slots])
        self._groups: dict[int, Hyperparameters] = {}
        self._measured: list[Launch] = []  # the launches whose sums are in the table
        if backend.FILLS_COEFFICIENTS:
            self._filling = Filling(self.coefficients, [slot.group for slot in self.slots])
            for launch in self.launches:
                backend.prepare(launch.plan)

    def _launch(self, members: list[Member], rows: slice, count: int) -> Launch:
        plan = Plan([m.slot.operands(m.param, m.state) for m in members], members[0].grad_dtype)
        group_rows = [(self.slots[r.start].group, r) for r in _runs(self.slots, rows, lambda slot: slot.group)]
        indices = [m.slot.index for m in members]
        if indices == list(range(count)):
            return Launch(plan, rows, None, lambda everything: everything, group_rows)
        # For a single index, itemgetter returns the item instead of a tuple.
        of = itemgetter(*indices) if len(indices) > 1 else lambda everything: (everything[indices[0]],)
        return Launch(plan, rows, indices, of, group_rows)

    def check_capture(self) -> None:
        """Raise RuntimeError if a CUDA graph cannot capture this step."""
        if not self.backend.CAPTURABLE:
            raise RuntimeError(f"a CUDA graph cannot capture a step of {self.backend.__name__}: use backend='cuda'")

    def set_grads(self, grads: list[Tensor | None], described: Description) -> None:
        """Take this step's gradients, of all parameters. Nothing else changes."""
        for launch in self.launches:
            addresses = launch.addresses_of(described.addresses) if described.contiguous else None
            launch.plan.set_grads(launch.of(grads), addresses)

    def take_norms(self, groups: list[Hyperparameters]) -> None:
        """Take the current norms of the deltas that are renewed. For deltas with a `whole_norm`, scalings by norms
        divide by that norm instead of the remaining one, so that their pull fades as it does with the other scalings.
        """
        if not self.renewed:
            return
        slots = [self.slots[row] for row in self.renewed]
        bounds = [slot.bound for slot in slots if slot.bound is not None]
        norms = torch.stack([bound.norm for bound in bounds if bound.norm is not None])
        self.coefficients.set_delta_norms(self._renewed_rows, norms)
        wholes = [bound.whole_norm for bound in bounds if bound.whole_norm is not None]
        if not wholes:
            return
        by_norms = tuple(groups[slot.group].needs_stats for slot in slots)
        if self._by_norms is None or self._by_norms[0] != by_norms:
            self._by_norms = by_norms, torch.tensor(by_norms, dtype=torch.bool, device=norms.device)
        whole = torch.stack(wholes)
        left = torch.where(self._by_norms[1] & (whole > 0), norms / whole, 1.0)
        self.coefficients.set_alphas(self._renewed_rows, left * self._alphas)

    def lend(self, params: list[Tensor], states: Any) -> None:
        """Lend the plans their tensors again. `params`: all parameters (DTensors whole), the keys of `states`."""
        for launch in self.launches:
            launch.plan.operands = [
                slot.operands(params[slot.index], self._rule.state_of(states, params[slot.index]))
                for slot in self.slots[launch.rows]
            ]

    def release(self) -> None:
        """Drop the references to parameters, states and gradients."""
        for launch in self.launches:
            launch.plan.release()

    def begin(self, groups: list[Hyperparameters], grad_scale: GradScale) -> None:
        """Take this step's hyperparameters of all groups, and fill the coefficients that need no gradient."""
        for launch in self.launches:
            for group, rows in launch.group_rows:
                before = self._groups.get(group)
                if groups[group].must_be_written(before):
                    self.coefficients.set_hyperparameters(rows, groups[group], before)
        self._groups = dict(enumerate(groups))
        if self._rule.advances:
            self.coefficients.advance(grad_scale)
        else:
            self.coefficients.refresh()

    def fill(self, groups: list[Hyperparameters], grad_scale: GradScale, max_grad_norm: float | None) -> Tensor | None:
        """Have the backend fill all coefficients of a step, and return the norm before clipping. Requires `can_fill`.
        Replaces `begin`, `bias` and the clipping by the engine."""
        with_stats = self._measure_all(groups, all_stats=max_grad_norm is not None)
        norm = self._filling.prepare(
            groups, grad_scale, advances=self._rule.advances, with_stats=with_stats, max_grad_norm=max_grad_norm
        )
        self._groups = {}  # the next `begin` must write all of them
        self.backend.fill_coefficients(self._filling)
        return norm

    def can_fill(self, groups: list[Hyperparameters]) -> bool:
        """Whether the backend can fill the coefficients of these groups."""
        return self.backend.FILLS_COEFFICIENTS and len(groups) <= MAX_GROUPS

    def bias(self, groups: list[Hyperparameters], all_stats: bool) -> Tensor:
        """Measure the gradient statistics that are needed (or all of them), and return the prior's coefficients,
        float64 [n]."""
        return self.coefficients.bias(self._measure_all(groups, all_stats))

    def _measure_all(self, groups: list[Hyperparameters], all_stats: bool) -> bool:
        """Measure the gradient statistics that are needed, over all ranks; return whether there are any."""
        measured = [launch for launch in self.launches if all_stats or launch.needs_stats(groups)]
        if not measured:
            return False
        stats = self.coefficients.stats
        # What is not measured now must be zero. (A graph cannot know what is measured before its replay.)
        stale = any(launch not in measured for launch in self._measured)
        if stale or (len(measured) < len(self.launches) and capturing()):
            stats.zero_()
        self._measured = measured
        for launch in measured:
            self.measure(launch.plan, launch.rows, launch, groups)
        self._reduction.sum_(stats)
        return True

    def measure(self, plan: Plan, rows: slice, launch: Launch, groups: list[Hyperparameters]) -> None:
        """Measure the gradient statistics of these rows of a launch, whose tensors are in `plan`."""
        with_delta = launch.reads_delta(groups, decoupled=False)
        self.backend.grad_stats(plan, self.coefficients.stats[rows], with_delta=with_delta)

    def run(self, plan: Plan, rows: slice, launch: Launch, groups: list[Hyperparameters]) -> None:
        """Apply the rule to these rows of a launch, whose tensors are in `plan`."""
        for readers in self._readers:
            readers.add(plan.device)
        with_delta = launch.reads_delta(groups, decoupled=self._rule.reads_decoupled)
        self._rule.run(self.backend, plan, self.coefficients.table[rows], with_delta=with_delta)

    def run_all(self, groups: list[Hyperparameters]) -> None:
        for launch in self.launches:
            self.run(launch.plan, launch.rows, launch, groups)
