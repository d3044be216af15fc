"""What biases gradients in place, for `gradients.py` and `hooks.py`: which parameters, and the launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PriorError
from ..kernels import backends
from ..kernels.coefficients import GRADIENT_SCALINGS, CoefficientTable, Hyperparameters
from ..kernels.plan import Operands, Plan
from ..sharding import Reduction, Shard, local, local_pairs, place_grads
from .binding import BoundDelta, PriorBinding
from .hyperparameters import PARAM_DTYPES, check_grad, hyperparameters

NamedParams = Iterable[tuple[str, Tensor]]

# What a param group says of AdamW, of which the bias needs nothing.
_NO_STEP: dict[str, Any] = {
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 0.0,
    "weight_decay": 0.0,
    "maximize": False,
    "capturable": False,
}


class BiasFigures(NamedTuple):
    """Of one bias, on the device: reading one is the only thing that waits.

    Attributes:
        names: the parameters that were biased, n of them.
        cosine: float64 [n], cos(g, delta); None if the scaling needs no gradient statistics.
        ratio: float64 [n], norm(c*delta)/norm(g); likewise.
    """

    names: list[str]
    cosine: Tensor | None
    ratio: Tensor | None


@dataclass(frozen=True)
class _Slot:
    """A parameter with a gradient that the prior covers."""

    index: int  # among the parameters that are biased together
    name: str
    param: Tensor
    grad_dtype: torch.dtype
    bound: BoundDelta
    shard: Shard | None  # `param` is what this rank holds

    @property
    def dtypes(self) -> tuple[str, str]:
        """What gradients of one plan have in common."""
        return str(self.grad_dtype), str(self.bound.delta.dtype)

    @property
    def operands(self) -> Operands:
        no_state = torch.empty(0)
        return Operands(self.param, no_state, no_state, delta=self.bound.delta, delta_scale=self.bound.delta_scale)


class _DeviceBias:
    """The gradients of one device, in the order of their plans, and their rows of one coefficient table."""

    def __init__(self, device: torch.device, slots: list[_Slot], backend: backends.Backend) -> None:
        self.backend = backend
        self.slots = sorted(slots, key=lambda slot: (slot.dtypes, slot.index))
        self.names = [slot.name for slot in self.slots]
        self.launches: list[tuple[Plan, slice]] = []
        for _, group in groupby(self.slots, key=lambda slot: slot.dtypes):
            same = list(group)
            start = self.launches[-1][1].stop if self.launches else 0
            plan = Plan([slot.operands for slot in same], same[0].grad_dtype)
            self.launches.append((plan, slice(start, start + len(same))))
        bounds = [slot.bound for slot in self.slots]
        self.coefficients = CoefficientTable(
            device,
            torch.zeros(len(bounds)),
            [bound.delta_norm for bound in bounds],
            [bound.param_norm for bound in bounds],
        )
        self._reduction = Reduction([slot.shard for slot in self.slots])
        self._written: Hyperparameters | None = None

    def apply_(self, h: Hyperparameters, grads: list[Tensor]) -> None:
        """`grads`: of the slots."""
        table = self.coefficients
        if h.must_be_written(self._written):
            table.set_hyperparameters(slice(None), h, self._written)
            table.refresh()
            self._written = h
        for plan, rows in self.launches:
            plan.set_grads(grads[rows])
            if h.needs_stats:
                self.backend.grad_stats(plan, table.stats[rows], with_delta=True)
        if h.needs_stats:
            self._reduction.sum_(table.stats)
        table.set_gradient_coefficients(table.bias(h.needs_stats), None)
        for plan, rows in self.launches:
            self.backend.bias(plan, table.table[rows])
            for grad, written in zip(grads[rows], plan.grads, strict=True):
                if written is not grad:  # a copy, of a gradient that is not contiguous
                    grad.copy_(written)
            plan.release_grads()
        torch.autograd.graph.increment_version(grads)


class BiasedTogether:
    """Parameters whose gradients are biased by the same launches. Plans are kept for as long as they fit.

    Args:
        named: covered by the prior.
        binding: has checked them.
        backend: "auto" or the name of one.
    """

    def __init__(self, named: list[tuple[str, Tensor]], binding: PriorBinding, backend: str) -> None:
        self._named = named
        self._binding = binding
        self._backend = backend
        self._batches: list[_DeviceBias] = []
        self._key: object = None

    @torch.no_grad()
    def apply_(self, h: Hyperparameters) -> BiasFigures:
        """Biases the gradients that are there. Everything is checked before anything changes."""
        if not h.biases:
            return BiasFigures([], None, None)
        params = [param for _, param in self._named]
        place_grads(params)
        grads: list[Any] = local_pairs(params, [param.grad for param in params])[1]
        present = [grad for grad in grads if grad is not None]
        key = [grad is None for grad in grads], [*map(type, present)], [*map(_KIND, present)]
        if key != self._key:
            self._batches, self._key = self._build(grads), key
        for batch in self._batches:
            batch.apply_(h, [grads[slot.index] for slot in batch.slots])
        names = [name for batch in self._batches for name in batch.names]
        tables = [batch.coefficients for batch in self._batches]
        return BiasFigures(
            names, _joined([table.prior_cosine for table in tables]), _joined([table.prior_ratio for table in tables])
        )

    def _build(self, grads: list[Tensor | None]) -> list[_DeviceBias]:
        present = [(i, *self._named[i], grad) for i, grad in enumerate(grads) if grad is not None]
        for _, name, param, grad in present:
            check_biased(name, param)
            check_grad(name, local(param), grad)
        resolved = {param.device: backends.resolve(self._backend, param.device) for _, _, param, _ in present}
        by_device: dict[torch.device, list[_Slot]] = {}
        parts = [(name, local(param), Shard.of(param)) for _, name, param, _ in present]
        for (i, name, _, grad), (_, param, shard), bound in zip(present, parts, self._binding.bind(parts), strict=True):
            assert bound is not None, "covered, as it was when it was checked"
            by_device.setdefault(param.device, []).append(_Slot(i, name, param, grad.dtype, bound, shard))
        return [_DeviceBias(device, slots, resolved[device]) for device, slots in by_device.items()]


_KIND = attrgetter("dtype", "device", "layout")


def _joined(vectors: list[Tensor | None]) -> Tensor | None:
    """Those of several devices, on the first of them; without a copy where there is only one."""
    found = [vector for vector in vectors if vector is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat([vector.to(found[0].device) for vector in found])


def check_biased(name: str, param: Tensor) -> None:
    """Raises TypeError, naming the parameter, for one whose gradient cannot be biased."""
    if param.dtype not in PARAM_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
        raise TypeError(f"parameter {name} has dtype {param.dtype}; expected one of {expected}")


def covered(named_params: NamedParams, binding: PriorBinding) -> list[tuple[str, Tensor]]:
    """The parameters that the prior has a delta for.

    Raises:
        PriorError: they have no names.
        PriorMismatchError: none is covered, or one by name but not by shape.
        ValueError: one is given twice.
        TypeError: the gradient of one that is covered cannot be biased.
    """
    named = list(named_params)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in named):
        raise PriorError(
            "a prior is bound by parameter names, and these parameters have none: pass model.named_parameters()"
        )
    names: dict[int, str] = {}
    for name, param in named:
        if id(param) in names:
            raise ValueError(f"parameter {name} is {names[id(param)]} too: its gradient would be biased twice")
        names[id(param)] = name
    binding.check(named)
    matched = dict(binding.prior.coverage(named).matched)
    found = [(name, param) for name, param in named if name in matched]
    for name, param in found:
        check_biased(name, param)
    return found


class BiasSettings:
    """alpha and the scaling, in a param group as optimizers have it, so that `AlphaScheduler` takes it for one."""

    def __init__(self, alpha: float | Tensor, scaling: str, normalize_to_param: bool) -> None:
        group = {"alpha": alpha, "prior_scaling": scaling, "normalize_to_param": normalize_to_param}
        self.param_groups: list[dict[str, Any]] = [group]
        self._hyperparameters([])

    @property
    def alpha(self) -> float | Tensor:
        """Strength of the prior; may be set between steps."""
        return self.param_groups[0]["alpha"]

    @alpha.setter
    def alpha(self, alpha: float | Tensor) -> None:
        self.param_groups[0]["alpha"] = alpha

    def _hyperparameters(self, params: list[Tensor]) -> Hyperparameters:
        """`params`: the first says where an alpha that is a tensor should be."""
        group = self.param_groups[0]
        scaling = group["prior_scaling"]
        if scaling not in GRADIENT_SCALINGS:
            reason = " (it moves parameters, not gradients: use FusedDriftAdamW)" if scaling == "decoupled" else ""
            raise ValueError(f"scaling must be one of {', '.join(GRADIENT_SCALINGS)}, got {scaling!r}{reason}")
        return hyperparameters({**_NO_STEP, **group, "params": params}, 0)
