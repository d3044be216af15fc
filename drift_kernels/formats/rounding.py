"""float32 as narrower dtypes, and as two halves that lose nothing. The specification of csrc/rounding.h.

Every function works element by element on tensors of any shape.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `x` rounded to `dtype`, to nearest, ties to even; a NaN to the canonical quiet NaN."""
    if dtype == torch.float32:
        return x
    return torch.where(x.isnan(), torch.full((), float("nan"), dtype=dtype, device=x.device), x.to(dtype))


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 root of float32 `x`.

    (`torch.sqrt` on the CPU is an ulp off for some of its inputs; the float64 root, rounded once more, is exact.)
    """
    return x.double().sqrt().float()


def sqrt64(x: Tensor) -> Tensor:
    """The correctly rounded float64 root of float64 `x`. (`torch.sqrt` gives it on a GPU alone.)"""
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) if x.device.type == "cpu" else x.sqrt()


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """float32 `x` as bfloat16, rounded up or down by 16 `random` bits so that the mean is x. Inf stays, NaN becomes the
    canonical quiet NaN."""
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    high = (bits + random) >> 16  # of an infinity's lower half, which is zero, nothing is carried
    return torch.where(x.isnan(), 0x7FC0, high).to(torch.int16).view(torch.bfloat16)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `x` as the nearest bfloat16 (ties away from zero) and an int16 residual: nothing is lost.

    With ties to even the neighbourhood of an even value would hold one residual too many. A NaN becomes the canonical
    quiet NaN, with residual 0.
    """
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32).to(torch.int64))
    nearest = (bits + 0x8000) >> 16
    return nearest.to(torch.int16).view(torch.bfloat16), (bits - (nearest << 16)).to(torch.int16)


def join(nearest: Tensor, residual: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    return ((nearest.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)).view(torch.float32)
