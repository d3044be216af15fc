"""States of one byte: codes with a float32 scale for each block of 128 elements. The specification of csrc/codes.h.

The code of exp_avg is c in [-127, 127] and means c*|c|*scale; that of exp_avg_sq is c in [0, 255] and means c*c*scale:
steps that shrink toward zero. An exp_avg_sq that is not zero never gets the code of zero, by whose root the update
would be divided. One NaN or Inf makes the scale of its block NaN, and so all of the block in the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
MOMENT, VARIANCE = torch.int8, torch.uint8  # dtypes of the codes of exp_avg and exp_avg_sq
_LARGEST = {MOMENT: 127, VARIANCE: 255}


def blocks(numel: int) -> int:
    return (numel + BLOCK - 1) // BLOCK


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """float32 [blocks] -> the shape of `like`: each element's scale."""
    return scale.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 of the codes' shape."""
    c = codes.to(torch.int32)
    return (c * c.abs()).to(torch.float32) * spread(scale, codes)


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 `x` as codes of `dtype` (MOMENT or VARIANCE), to the nearest on the scale of roots, and their scales."""
    largest_code = _LARGEST[dtype]
    magnitude = x.abs().flatten()
    padded = magnitude.new_zeros(blocks(x.numel()) * BLOCK)
    padded[: x.numel()] = magnitude
    largest = padded.view(-1, BLOCK).view(torch.int32).amax(1).view(torch.float32)  # as integers: a NaN is the largest
    scale = largest / float(largest_code**2)
    scale = torch.where((largest != 0) & (scale == 0), torch.full_like(scale, 2.0**-149), scale)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    divisor = spread(torch.where(scale > 0, scale, torch.inf), x)
    nearest = (
        (x.abs() / divisor).double().sqrt().float().round()
    )  # the root is the rounded float32 one (reference.sqrt)
    code = torch.where(nearest < largest_code, nearest, float(largest_code))
    if dtype == VARIANCE:
        code = torch.where((code == 0) & (x > 0), 1.0, code)
    return torch.where(x < 0, -code, code).to(dtype), scale
