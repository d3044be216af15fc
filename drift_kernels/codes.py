"""States of one byte: codes with a float32 scale for each block of 128 elements. The specification of csrc/codes.h.

The code of exp_avg is c in [-127, 127] and means c*|c|*scale: steps that shrink toward zero. That of exp_avg_sq is c in
[0, 255], of its root, and means (c*scale)^2. An exp_avg_sq that is not zero never gets the code of zero, by which the
update would be divided. One NaN or Inf makes the scale of its block NaN, and so all of the block in the next step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128
MOMENT, VARIANCE = torch.int8, torch.uint8  # dtypes of the codes of exp_avg and exp_avg_sq
_LARGEST = {MOMENT: 127.0, VARIANCE: 255.0}
_NORMAL = 2.0**-126


def blocks(numel: int) -> int:
    return (numel + BLOCK - 1) // BLOCK


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a tensor of this shape: as many as blocks; row by row where rows are whole blocks, so that they
    are sharded as the tensor is."""
    if len(shape) > 1 and shape[-1] % BLOCK == 0:
        return (*shape[:-1], shape[-1] // BLOCK)
    return (blocks(math.prod(shape)),)


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """float32 scales -> the shape of `like`: each element's scale."""
    return scale.flatten().repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 of the codes' shape."""
    c = codes.to(torch.int32)
    if codes.dtype == MOMENT:
        return (c * c.abs()).to(torch.float32) * spread(scale, codes)
    root = c.to(torch.float32) * spread(scale, codes)
    return root * root


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 `x` as codes of `dtype` (MOMENT or VARIANCE), to the nearest on the scale of roots, and their scales."""
    coded = x.abs() if dtype == MOMENT else _sqrt(x)  # what is proportional to the scale
    padded = torch.zeros(blocks(x.numel()) * BLOCK, device=x.device)
    padded[: x.numel()] = coded.flatten()
    largest = padded.view(-1, BLOCK).view(torch.int32).amax(1).view(torch.float32)  # as integers: a NaN is the largest
    limit = _LARGEST[dtype]
    scale = largest / (limit**2 if dtype == MOMENT else limit)
    scale = torch.where((largest != 0) & (scale < _NORMAL), _NORMAL, scale)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    scaled = coded * spread(torch.where(scale > 0, 1 / scale, 0.0), x)
    nearest = (_sqrt(scaled) if dtype == MOMENT else scaled).round()
    code = torch.where(nearest < limit, nearest, limit)
    if dtype == VARIANCE:
        code = torch.where((code == 0) & (coded > 0), 1.0, code)
    return torch.where(x < 0, -code, code).to(dtype), scale


def _sqrt(x: Tensor) -> Tensor:
    """As `reference.sqrt`."""
    return x.double().sqrt().float()
