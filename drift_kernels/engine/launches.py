"""Everything one device needs for a step: the plans of its tensors and their rows of one coefficient table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..formats.philox import Place
from ..kernels.backends import Backend
from ..kernels.coefficients import UNSCALED, CoefficientTable, GradScale, Hyperparameters
from ..kernels.plan import Operands, Plan, addresses
from ..sharding import Reduction, Shard, local
from ..state.precision import OPERAND_STATES
from .binding import BoundDelta


@dataclass(frozen=True)
class Slot:
    """One parameter with a gradient, and what the step needs of it; tensors are what this rank holds."""

    index: int  # among all parameters of the optimizer
    group: int
    name: str
    param: Tensor
    grad_dtype: torch.dtype
    state: dict[str, Any]
    bound: BoundDelta | None
    random_key: int | None  # for stochastic rounding
    place: Place
    shard: Shard | None

    @property
    def operands(self) -> Operands:
        state = self.state
        tensors: dict[str, Any] = {name: local(state[key]) for name, key in OPERAND_STATES.items() if key in state}
        if self.bound is not None:
            tensors |= {"delta": self.bound.delta, "delta_scale": self.bound.delta_scale}
        return Operands(self.param, **tensors, random_key=self.random_key, place=self.place)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What tensors of one plan have in common."""
        delta = None if self.bound is None else self.bound.delta.dtype
        return str(self.param.dtype), str(self.grad_dtype), str(self.state["exp_avg"].dtype), str(delta)


@dataclass(frozen=True)
class Launch:
    """A plan, its rows of the coefficient table, and which of them belong to which param group."""

    plan: Plan
    rows: slice
    of: Callable[[list[Any]], tuple[Any, ...]]  # from a list over all parameters of the optimizer, those of the launch
    group_rows: list[tuple[int, slice]]

    def biased(self, groups: list[Hyperparameters], decoupled: bool) -> bool:
        """Whether a delta is to be read: to bias a gradient, or (if asked) to move a param decoupled from it."""
        return self.plan.has_deltas and any(
            groups[group].biases and (decoupled or groups[group].scaling != "decoupled") for group, _ in self.group_rows
        )

    def needs_stats(self, groups: list[Hyperparameters]) -> bool:
        return self.plan.has_deltas and any(groups[group].needs_stats for group, _ in self.group_rows)


def _runs(slots: list[Slot], rows: slice, key: Callable[[Slot], Any]) -> Iterator[slice]:
    """The slices of consecutive slots with equal keys, within `rows`."""
    start = rows.start
    for stop in range(start + 1, rows.stop + 1):
        if stop == rows.stop or key(slots[stop]) != key(slots[start]):
            yield slice(start, stop)
            start = stop


class DeviceBatch:
    """The tensors of one device, in the order of their plans, then of their groups.

    Args:
        device: of the params, states and deltas.
        slots: at least one.
        steps_device: where the step counts live.
        backend: one that runs on the device.
    """

    def __init__(self, device: torch.device, slots: list[Slot], steps_device: torch.device, backend: Backend) -> None:
        self.backend = backend
        self.slots = sorted(slots, key=lambda slot: (slot.dtypes, slot.group, slot.index))
        self.launches = [
            self._launch(rows) for rows in _runs(self.slots, slice(0, len(slots)), lambda slot: slot.dtypes)
        ]
        bounds = [slot.bound for slot in self.slots]
        self.coefficients = CoefficientTable(
            device,
            self._share_steps(steps_device),
            [0.0 if bound is None else bound.delta_norm for bound in bounds],
            [0.0 if bound is None else bound.param_norm for bound in bounds],
        )
        biased = [t for t, bound in enumerate(bounds) if bound is not None]
        self.biased_rows = torch.tensor(biased, dtype=torch.int64, device=device)
        self._reduction = Reduction([slot.shard for slot in self.slots])
        self._groups: dict[int, Hyperparameters] = {}
        self._places = self._first_addresses()
        self._params = [slot.param for slot in self.slots]

    def _launch(self, rows: slice) -> Launch:
        slots = self.slots[rows]
        plan = Plan([slot.operands for slot in slots], slots[0].grad_dtype)
        group_rows = [(self.slots[r.start].group, r) for r in _runs(self.slots, rows, lambda slot: slot.group)]
        indices = [slot.index for slot in slots]
        # itemgetter gives one thing, not a tuple of one, for one index.
        of = itemgetter(*indices) if len(indices) > 1 else lambda everything: (everything[indices[0]],)
        return Launch(plan, rows, of, group_rows)

    def _share_steps(self, device: torch.device) -> Tensor:
        """The step counts as one tensor, of which each state's `step` becomes a view: one operation advances all."""
        steps = torch.stack(
            [torch.as_tensor(slot.state["step"], dtype=torch.float32, device=device) for slot in self.slots]
        )
        for slot, step in zip(self.slots, steps, strict=True):
            slot.state["step"] = step
        return steps

    def check_capture(self) -> None:
        """Raises RuntimeError if a CUDA graph cannot hold this step."""
        if not self.backend.CAPTURABLE:
            raise RuntimeError(f"a CUDA graph cannot hold a step of {self.backend.__name__}: use backend='cuda'")

    def states_were_moved(self) -> bool:
        """Looks at each launch's first, since whoever moves states (offloading) moves all."""
        return self._first_addresses() != self._places

    def _first_addresses(self) -> list[int]:
        return addresses(
            [t for launch in self.launches for o in launch.plan.operands[:1] for t in (o.exp_avg, o.exp_avg_sq)]
        )

    def set_grads(self, grads: list[Tensor | None]) -> None:
        """Takes this step's gradients, of all parameters. Changes nothing else."""
        for launch in self.launches:
            launch.plan.set_grads(launch.of(grads))

    def advance(self, groups: list[Hyperparameters], grad_scale: GradScale = UNSCALED) -> None:
        """Takes this step's hyperparameters, of all groups, and counts the step."""
        for launch in self.launches:
            for group, rows in launch.group_rows:
                before = self._groups.get(group)
                if groups[group].must_be_written(before):
                    self.coefficients.set_hyperparameters(rows, groups[group], before)
        self._groups = dict(enumerate(groups))
        self.coefficients.advance(grad_scale)

    def bias(self, groups: list[Hyperparameters], all_stats: bool) -> Tensor:
        """The prior's coefficients, float64 [n], after the gradient statistics that they need (or those of all)."""
        measured = [launch for launch in self.launches if all_stats or launch.needs_stats(groups)]
        if measured:
            stats = self.coefficients.stats
            if len(measured) < len(self.launches):
                stats.zero_()  # what is not measured now, or ranks would add up what they added up before
            for launch in measured:
                with_delta = launch.biased(groups, decoupled=False)
                self.backend.grad_stats(launch.plan, stats[launch.rows], with_delta=with_delta)
            self._reduction.sum_(stats)
        return self.coefficients.bias(bool(measured))

    def update(self, groups: list[Hyperparameters]) -> None:
        for launch in self.launches:
            table = self.coefficients.table[launch.rows]
            self.backend.update(launch.plan, table, with_delta=launch.biased(groups, decoupled=True))
        # So that autograd sees it: a graph that holds a parameter as it was can no longer be run backward.
        torch.autograd.graph.increment_version(self._params)

    def release_grads(self) -> None:
        for launch in self.launches:
            launch.plan.release_grads()


class BatchCache:
    """The batches of the last step, for as long as they fit: nothing that they depend on has been replaced.

    All of it is looked at in every step, so it is mapped in C.
    """

    batches: list[DeviceBatch]

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing fits any more."""
        self.batches = []
        self._params: list[Tensor] = []
        self._key: tuple[Any, ...] = ()
        self._contents: list[Any] = []

    def fits(self, params: list[Tensor], grads: list[Tensor | None], states: Iterable[dict[str, Any]]) -> bool:
        """Whether these are the parameters of the last step, where they were, with gradients of the same dtypes and
        states of the same tensors."""
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and _key(params, grads) == self._key
            and all(map(is_, _contents(states), self._contents))
            and not any(batch.states_were_moved() for batch in self.batches)
        )

    def hold(
        self,
        batches: list[DeviceBatch],
        params: list[Tensor],
        grads: list[Tensor | None],
        states: Iterable[dict[str, Any]],
    ) -> None:
        self.batches, self._params, self._key = batches, params, _key(params, grads)
        self._contents = list(_contents(states))


_END = object()


def _key(params: list[Tensor], grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Where the parameters are, and of which type and dtype their gradients are, None for those that have none."""
    return addresses(params), list(map(type, grads)), [None if g is None else g.dtype for g in grads]


def _contents(states: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """All that the states hold, one after another, and a mark behind the last, which shows where one is shorter."""
    return chain(chain.from_iterable(map(dict.values, states)), (_END,))
