"""Deltas for live parameters: bound by name, loaded when first needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import PriorMismatchError
from .prior import Prior, QuantizedDelta

PriorLike = Prior | str | os.PathLike[str] | Mapping[str, Tensor | QuantizedDelta]


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

    Names and shapes are checked by `check`, at once; data is loaded by `bound`, parameter by parameter, since FSDP2,
    Accelerate and device moves replace parameters between the two.
    """

    def __init__(self, prior: Prior, on_host: bool = False) -> None:
        self.prior = prior
        self._on_host = on_host  # whether deltas stay in pinned host memory
        self._names: dict[str, str] = {}
        self._checked: list[tuple[str, torch.Size]] = []
        self._bound: dict[str, BoundDelta] = {}

    @classmethod
    def of(cls, prior: PriorLike, device: str | torch.device | None) -> PriorBinding:
        """A binding of a prior, of the folder of one, or of a mapping from names to deltas; `device`: "cpu" or None."""
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"prior_device must be 'cpu', or None for that of each parameter, got {device}")
        if isinstance(prior, Mapping):
            prior = Prior.from_mapping(prior)
        elif isinstance(prior, (str, os.PathLike)):
            prior = Prior.open(prior)
        if not isinstance(prior, Prior):
            found = type(prior).__name__
            raise TypeError(f"prior must be a Prior, a path, or a mapping from names to deltas, got {found}")
        return cls(prior, on_host=device is not None)

    def check(self, named_parameters: list[tuple[str, Tensor]]) -> None:
        """Matches the parameters, unless they are those of the last time.

        Raises:
            PriorMismatchError: not one name matches, or a matched delta has another shape than its parameter.
        """
        shapes = [(name, param.shape) for name, param in named_parameters]
        if shapes == self._checked:
            return
        coverage = self.prior.match(named_parameters)
        if coverage.shape_mismatches:
            name, prior_name, shape, prior_shape = coverage.shape_mismatches[0]
            raise PriorMismatchError(
                f"parameter {name!r} has shape {tuple(shape)}, but the prior's delta {prior_name!r} has shape "
                f"{tuple(prior_shape)} ({len(coverage.shape_mismatches)} such parameters): it is of another model"
            )
        self._names = dict(coverage.matched)
        self._checked = shapes

    def bound(self, name: str, param: Tensor) -> BoundDelta | None:
        """The delta of a parameter, on its device; None if the prior has none for it."""
        if name not in self._names:
            return None
        device = torch.device("cpu") if self._on_host else param.device
        found = self._bound.get(name)
        if found is None:
            info = self.prior.info(self._names[name])
            param_norm = info.param_norm
            if param_norm is None:
                param_norm = float(torch.linalg.vector_norm(param.detach(), dtype=torch.float64))
            # Kernels read codes beside bfloat16 parameters.
            load = self.prior.load_stored if param.dtype == torch.bfloat16 else self.prior.load
            stored = load(self._names[name], device, copy=False)
            delta, scale = (stored, None) if isinstance(stored, Tensor) else (stored.codes, stored.scales)
            if self._on_host and param.is_cuda:
                delta, scale = delta.pin_memory(), None if scale is None else scale.pin_memory()
            found = self._bound[name] = BoundDelta(delta, scale, info.delta_norm, param_norm)
        elif found.delta.device != device:
            found = self._bound[name] = found.to(device)
        return found
