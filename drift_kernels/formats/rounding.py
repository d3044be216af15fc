"""Rounding float32 to narrower dtypes, and splitting it losslessly into two halves. The specification of
csrc/rounding.h.

All functions are elementwise, on tensors of any shape.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 `x` to `dtype`: to nearest, ties to even. A NaN becomes the canonical quiet NaN."""
    if dtype == torch.float32:
        return x
    return torch.where(x.isnan(), torch.full((), float("nan"), dtype=dtype, device=x.device), x.to(dtype))


def sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded float32 square root of float32 `x`.

    `torch.sqrt` on the CPU is one ulp off for some inputs; the float64 root rounded to float32 is always exact.
    """
    return x.double().sqrt().float()


def sqrt64(x: Tensor) -> Tensor:
    """Return the correctly rounded float64 square root of float64 `x`. `torch.sqrt` does so only on GPUs."""
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) if x.device.type == "cpu" else x.sqrt()


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16, up or down by 16 `random` bits, so that the mean is x. Inf stays Inf; NaN becomes
    the canonical quiet NaN."""
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    high = torch.where(x.isfinite(), bits + random, bits) >> 16
    return torch.where(x.isnan(), 0x7FC0, high).to(torch.int16).view(torch.bfloat16)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 `x` losslessly into the nearest bfloat16 (ties away from zero) and an int16 residual.

    With ties to even, an even value would need one residual more than int16 has. A NaN becomes the canonical quiet NaN,
    with residual 0.
    """
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32).to(torch.int64))
    nearest = (bits + 0x8000) >> 16
    return nearest.to(torch.int16).view(torch.bfloat16), (bits - (nearest << 16)).to(torch.int16)


def join(nearest: Tensor, residual: Tensor) -> Tensor:
    """Return the float32 that `split` took apart."""
    return ((nearest.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)).view(torch.float32)
