"""Deltas for live parameters: bound by name, loaded when first needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PriorMismatchError
from ..prior import Prior, PriorLike, QuantizedDelta
from ..prior.fusion import Source
from ..prior.norms import norm
from ..sharding import Reduction, Shard


@dataclass(frozen=True)
class BoundDelta:
    """A delta where the kernels read it, of a small prior its codes and scales; norm(delta) and norm(W) in float64."""

    delta: Tensor
    delta_scale: Tensor | None
    delta_norm: float
    param_norm: float

    def to(self, device: torch.device) -> BoundDelta:
        scale = None if self.delta_scale is None else self.delta_scale.to(device)
        return replace(self, delta=self.delta.to(device), delta_scale=scale)


class PriorBinding:
    """A prior matched to named parameters.

    Names and shapes are checked by `check`, at once; data is loaded by `bind`, since FSDP2, Accelerate and device moves
    replace parameters between the two. A copy or a pickled binding loads its own.
    """

    def __init__(self, prior: Prior, on_host: bool = False) -> None:
        self.prior = prior
        self._on_host = on_host  # whether deltas stay in pinned host memory
        self._sources: dict[str, str | Source] = {}  # by live name; one stored delta by its own name
        self._checked: dict[str, torch.Size] = {}
        self._param_norms: dict[str, float] = {}  # norm(W), of parameters as they were when they were first bound
        self._bound: dict[str, BoundDelta] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bound": {}}

    @classmethod
    def of(cls, prior: PriorLike, device: str | torch.device | None) -> PriorBinding:
        """A binding of a prior, of the folder of one, or of a mapping from names to deltas; `device`: "cpu" or None."""
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"prior_device must be 'cpu', or None for that of each parameter, got {device}")
        return cls(Prior.of(prior), on_host=device is not None)

    def check(self, named_parameters: list[tuple[str, Tensor]]) -> None:
        """Matches the parameters, unless they are among those of the last time.

        Raises:
            PriorMismatchError: not one name matches, or a matched delta has another shape than its parameter.
        """
        shapes = {name: param.shape for name, param in named_parameters}
        if shapes and shapes.items() <= self._checked.items():
            return
        coverage = self.prior.match(named_parameters)
        if coverage.shape_mismatches:
            name, prior_name, shape, prior_shape = coverage.shape_mismatches[0]
            raise PriorMismatchError(
                f"parameter {name!r} has shape {tuple(shape)}, but the prior's delta {prior_name!r} has shape "
                f"{tuple(prior_shape)} ({len(coverage.shape_mismatches)} such parameters): it is of another model"
            )
        sources = self.prior.sources(named_parameters)
        self._sources = {name: source.single.name if source.single else source for name, source in sources.items()}
        self._checked = shapes

    def covers(self, name: str) -> bool:
        """Whether there is a delta for this parameter, which has been checked."""
        return name in self._sources

    def bind(self, named: Sequence[tuple[str, Tensor, Shard | None]]) -> list[BoundDelta | None]:
        """The delta of each parameter, of which this rank holds a shard or all, on its device; None where the prior has
        none. A rank reads what it needs of the prior.

        Raises PriorFormatError for a damaged delta, and PriorMismatchError if ranks have different priors.
        """
        new = [
            (name, param, shard)
            for name, param, shard in named
            if name in self._sources and (name not in self._bound or self._bound[name].delta.shape != param.shape)
        ]
        self._compare(Reduction([shard for _, _, shard in new]), new)
        for name, param, shard in new:
            if name in self._bound:
                self._param_norms.pop(name, None)  # of another shape
            self._bound[name] = self._load(name, param, shard)
        self._measure([entry for entry in new if entry[2] is not None])
        for name, _, _ in new:
            norm_at_first = self._param_norms.setdefault(name, self._bound[name].param_norm)
            self._bound[name] = replace(self._bound[name], param_norm=norm_at_first)
        return [self._placed(name, param) if name in self._sources else None for name, param, _ in named]

    def _load(self, name: str, param: Tensor, shard: Shard | None) -> BoundDelta:
        info, part = self.prior.info(self._sources[name]), None if shard is None else shard.box
        device = self._device_for(param)
        # Kernels read codes beside bfloat16 parameters.
        stored = self.prior.load_stored(self._sources[name], device, copy=False, box=part)
        if isinstance(stored, QuantizedDelta) and param.dtype != torch.bfloat16:
            stored = stored.expand()
        delta, scale = (stored, None) if isinstance(stored, Tensor) else (stored.codes, stored.scales)
        if self._on_host and param.is_cuda:
            delta, scale = delta.pin_memory(), None if scale is None else scale.pin_memory()
        param_norm = info.param_norm
        if param_norm is None:
            param_norm = float(torch.linalg.vector_norm(param.detach(), dtype=torch.float64))
        return BoundDelta(delta, scale, info.delta_norm, param_norm)

    def _measure(self, new: list[tuple[str, Tensor, Shard | None]]) -> None:
        """Adds up what the ranks hold of norm(W), where it was not recorded, and of norm(delta), to compare it."""
        if not new:
            return
        found = [self._bound[name] for name, _, _ in new]
        squares = torch.tensor([[_norm(bound) ** 2, bound.param_norm**2] for bound in found], dtype=torch.float64)
        squares = squares.to(new[0][1].device)
        Reduction([shard for _, _, shard in new]).sum_(squares)
        for (name, _, _), bound, (delta_norm, param_norm) in zip(new, found, squares.sqrt().tolist(), strict=True):
            self.prior.check_norm_of_parts(self._sources[name], delta_norm)
            if self.prior.info(self._sources[name]).param_norm is None:
                self._bound[name] = replace(bound, param_norm=param_norm)

    def _compare(self, reduction: Reduction, new: list[tuple[str, Tensor, Shard | None]]) -> None:
        for group in reduction.groups:
            mark = int(self.prior.fingerprint[:12], 16)
            marks = torch.tensor([mark, -mark], device=new[0][1].device)
            dist.all_reduce(marks, dist.ReduceOp.MIN, group=group)
            if int(marks.sum()) != 0:
                raise PriorMismatchError(
                    f"ranks have different priors: here it is {self.prior.fingerprint[:12]} ({self.prior})"
                )

    def _device_for(self, param: Tensor) -> torch.device:
        return torch.device("cpu") if self._on_host else param.device

    def _placed(self, name: str, param: Tensor) -> BoundDelta:
        found = self._bound[name]
        if found.delta.device != self._device_for(param):
            found = self._bound[name] = found.to(self._device_for(param))
        return found


def _norm(bound: BoundDelta) -> float:
    return norm(bound.delta) if bound.delta_scale is None else QuantizedDelta(bound.delta, bound.delta_scale).norm()
