"""What an optimizer says of its last step and of the memory that it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state.precision import RESIDUAL, SCALES, STATES
from .launches import BatchCache, DeviceBatch

# Kinds of memory, and the operands of a plan that they are.
KINDS = {
    "param": ("param",),
    "states": STATES,
    "scales": (*SCALES.values(), "delta_scale"),
    RESIDUAL: ("residual",),
    "prior": ("delta",),
}


class Inspection:
    """Part of FusedDriftAdamW. Figures of a step are device tensors: reading one is the only thing that waits."""

    _cache: BatchCache
    _grad_norm: Tensor | None

    @property
    def _batches(self) -> list[DeviceBatch]:
        return self._cache.batches

    @property
    def grad_norm(self) -> Tensor | None:
        """float64 []: norm of the whole biased gradient, before clipping; None unless `max_grad_norm` is set."""
        return self._grad_norm

    @property
    def prior_names(self) -> list[str]:
        """The biased parameters of the last step, in the order of `prior_cosine` and `prior_ratio`."""
        return [slot.name for batch in self._batches for slot in batch.slots if slot.bound is not None]

    @property
    def prior_cosine(self) -> Tensor | None:
        """float64 [len(prior_names)]: cos(g, delta); None if the step needed no gradient statistics."""
        return self._of_biased("prior_cosine")

    @property
    def prior_ratio(self) -> Tensor | None:
        """float64 [len(prior_names)]: norm(c*delta)/norm(g); None if the step needed no gradient statistics."""
        return self._of_biased("prior_ratio")

    def _of_biased(self, attribute: str) -> Tensor | None:
        vectors = [(getattr(batch.coefficients, attribute), batch.biased_rows) for batch in self._batches]
        if not vectors or any(vector is None for vector, _ in vectors):
            return None
        return torch.cat([vector[rows].to(vectors[0][0].device) for vector, rows in vectors])

    def memory_report(self) -> dict[str, float]:
        """Bytes per parameter of what the last step worked on, by kind and in all ("total"), without the gradients.

        "param", "states", "scales" (of codes), "param_residual" (the other halves of masters) and "prior"; as
        allocated, over the elements of the parameters that had a gradient. Empty before the first step.
        """
        operands = [o for batch in self._batches for launch in batch.launches for o in launch.plan.operands]
        elements = sum(o.param.numel() for o in operands)
        if not elements:
            return {}

        def of_kind(names: tuple[str, ...]) -> float:
            tensors: list[Any] = [getattr(o, name) for o in operands for name in names]
            return sum(t.numel() * t.element_size() for t in tensors if t is not None) / elements

        report = {kind: of_kind(names) for kind, names in KINDS.items()}
        return {**report, "total": sum(report.values())}
