"""Plausibility checks of the norms of deltas: whether anything was fine-tuned, and from this base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from ..errors import PriorError
from .names import some
from .record import DeltaInfo

# The difference of two unrelated weights of equal norm has sqrt(2) times that norm; fine-tuning changes a fraction.
_UNRELATED = 1.0


def check_values(infos: Mapping[str, DeltaInfo]) -> list[str]:
    """Return warnings about these deltas. Raises PriorError if all are zero, which would be plain fine-tuning."""
    zero = zero_deltas(infos)
    if all_zero(infos):
        raise PriorError(
            f"all {len(zero)} deltas are zero, so training with this prior would be plain fine-tuning: the expert "
            "equals the checkpoint that was subtracted, or was saved without its changes"
        )
    warnings = [f"{len(zero)} of {len(infos)} deltas are zero: {some(zero)}"] if zero else []
    ratios = [info.delta_norm / info.param_norm for info in infos.values() if info.param_norm and len(info.shape) > 1]
    if ratios and (ratio := median(ratios)) > _UNRELATED:
        warnings.append(
            f"deltas are larger than the weights (the median of norm(delta)/norm(W) is {ratio:.2f}): was the expert "
            "fine-tuned from this base? Unrelated weights give about 1.4"
        )
    return warnings


def zero_deltas(infos: Mapping[str, DeltaInfo]) -> list[str]:
    """The names of the deltas that are zero; empty ones do not count."""
    return [name for name, info in infos.items() if info.delta_norm == 0 and _numel(info)]


def all_zero(infos: Mapping[str, DeltaInfo]) -> bool:
    """Whether all deltas are zero, and not all of them empty."""
    return any(map(_numel, infos.values())) and not any(info.delta_norm for info in infos.values())


def _numel(info: DeltaInfo) -> int:
    return math.prod(info.shape)
