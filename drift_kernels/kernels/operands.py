"""The tensors of one parameter that kernels work on, and their dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.philox import WHOLE, Place


@dataclass(frozen=True)
class Operands:
    """The tensors of one parameter but its gradient, contiguous; None for those that it does not have.

    Attributes:
        exp_avg, exp_avg_sq: of param's shape, float32, bfloat16, or int8 and uint8 codes (formats/blocks.py). An update
            has both.
        exp_avg_scale, exp_avg_sq_scale: float32 [blocks], beside codes.
        delta: of param's shape, float32, bfloat16, or int8 or float8_e4m3fn codes of a small prior.
        delta_scale: float32 [blocks], beside codes.
        residual: int16 of param's shape, the other half of a master (`formats.rounding.split`).
        random_key: seed + 2^32 * the parameter's index, for stochastic rounding of what is bfloat16, but a param that
            has a master.
        place: where the tensors lie in the whole ones that they are shards of, for the same.
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
    """Those of one launch; None for what it does not have."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype | None
    delta: torch.dtype | None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
