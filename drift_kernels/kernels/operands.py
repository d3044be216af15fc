"""The tensors of one parameter that kernels read and write, and their dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.philox import WHOLE, Place


@dataclass(frozen=True)
class Operands:
    """The tensors of one parameter except its gradient, all contiguous; None for those that it does not have.

    Attributes:
        exp_avg, exp_avg_sq: param's shape; float32, bfloat16, or int8 and uint8 codes (formats/blocks.py). An update
            needs both.
        exp_avg_scale, exp_avg_sq_scale: float32 [blocks], the scales of codes.
        delta: param's shape; float32, bfloat16, or int8 or float8_e4m3fn codes.
        delta_scale: float32 [blocks], the scales of codes.
        residual: int16, param's shape; the other half of a master weight (`formats.rounding.split`).
        random_key: seed + 2^32 * the parameter's index, for stochastic rounding of bfloat16 states and of a bfloat16
            param without a master weight.
        place: the position of a shard in the whole tensor, also for stochastic rounding.
    """

    param: Tensor
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    delta: Tensor | None = None
    residual: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    delta_scale: Tensor | None = None
    random_key: int | None = None
    place: Place = WHOLE


DTypeNames = tuple[str | None, str | None, str | None, str | None]


class DTypes(NamedTuple):
    """The dtypes of one launch; None for tensors that it does not have."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype | None
    delta: torch.dtype | None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
