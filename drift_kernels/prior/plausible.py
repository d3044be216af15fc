"""What the norms of deltas say about where they come from: nothing was fine-tuned, or not from this base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from ..errors import PriorError
from .names import some
from .record import DeltaInfo

# Of two unrelated weights of one norm the difference has sqrt(2) times that norm; fine-tuning changes a fraction.
_UNRELATED = 1.0


def check_values(infos: Mapping[str, DeltaInfo]) -> list[str]:
    """Warnings about deltas by name. Raises PriorError if all are zero: training with them is plain fine-tuning."""
    zero = zero_deltas(infos)
    if all_zero(infos):
        raise PriorError(
            f"all {len(zero)} deltas are zero, so that training with them would be plain fine-tuning: what was "
            "subtracted equals the expert, or the expert was saved without its changes"
        )
    warnings = [f"{len(zero)} of {len(infos)} deltas are zero: {some(zero)}"] if zero else []
    ratios = [info.delta_norm / info.param_norm for info in infos.values() if info.param_norm and len(info.shape) > 1]
    if ratios and (ratio := median(ratios)) > _UNRELATED:
        warnings.append(
            f"deltas are larger than the weights (the median of norm(delta)/norm(W) is {ratio:.2f}): are expert and "
            "base of one origin? Unrelated weights give about 1.4"
        )
    return warnings


def zero_deltas(infos: Mapping[str, DeltaInfo]) -> list[str]:
    """The names of those that have elements, all of them zero."""
    return [name for name, info in infos.items() if info.delta_norm == 0 and _numel(info)]


def all_zero(infos: Mapping[str, DeltaInfo]) -> bool:
    """Whether there are elements, all of them zero."""
    return any(map(_numel, infos.values())) and not any(info.delta_norm for info in infos.values())


def _numel(info: DeltaInfo) -> int:
    return math.prod(info.shape)
