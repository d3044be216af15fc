"""The figures of a step, and the memory that it works on.

Figures are tensors on the device: only reading one waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..state.precision import RESIDUAL, SCALES, STATES
from .launches import DeviceBatch

# Kinds of memory -> operands of a plan.
KINDS = {
    "param": ("param",),
    "states": STATES,
    "scales": (*SCALES.values(), "delta_scale"),
    RESIDUAL: ("residual",),
    "prior": ("delta",),
}


class BiasFigures(NamedTuple):
    """How strongly the gradients were biased. Tensors are on the device, and only reading one waits for it.

    Attributes:
        names: the parameters that were biased, n of them.
        cosine: cos(g, delta) of each, float64 [n]; None if the scaling needs no gradient statistics.
        ratio: norm(c*delta)/norm(g) of each, float64 [n]; None likewise.
    """

    names: list[str]
    cosine: Tensor | None
    ratio: Tensor | None


def bias_figures(batches: list[DeviceBatch]) -> BiasFigures:
    """The figures of the parameters that have a delta."""
    batches = [batch for batch in batches if batch.biased] or batches  # the others may not have needed statistics
    return BiasFigures(
        [batch.slots[row].name for batch in batches for row in batch.biased],
        _of_biased([(batch, batch.coefficients.prior_cosine) for batch in batches]),
        _of_biased([(batch, batch.coefficients.prior_ratio) for batch in batches]),
    )


def _of_biased(vectors: list[tuple[DeviceBatch, Tensor | None]]) -> Tensor | None:
    """The vectors of several devices, on the first of them; None if the step needed no statistics."""
    found = [vector[batch.biased_rows] for batch, vector in vectors if vector is not None]
    if not found or len(found) < len(vectors):
        return None
    return torch.cat([vector.to(found[0].device) for vector in found])


def memory_report(batches: list[DeviceBatch], made_of: int = 0) -> dict[str, float]:
    """Return bytes per parameter element by kind and in total; empty without batches.

    Args:
        batches: those of the last step.
        made_of: bytes that changing deltas are made from.
    """
    plans = [launch.plan for batch in batches for launch in batch.launches]
    elements = sum(plan.numel for plan in plans)
    if not elements:
        return {}
    report = {
        kind: sum(plan.nbytes.get(name, 0) for plan in plans for name in names) / elements
        for kind, names in KINDS.items()
    }
    report["prior"] += made_of / elements
    return {**report, "total": sum(report.values())}
