"""One-byte codes of optimizer states and deltas, with a float32 scale for each block of 128 elements in the flat order
of the tensor. The specification of csrc/codes.h.

    dtype of the codes     of            value                 scale
    MOMENT (int8)          exp_avg       code*|code|*scale     absmax / 127^2
    VARIANCE (uint8)       exp_avg_sq    (code*scale)^2        largest root / 255
    int8, float8_e4m3fn    a delta       code*scale            absmax / 127, absmax / 448

Codes of states are evenly spaced on a square-root scale: the steps between values shrink toward zero. A nonzero
exp_avg_sq never gets code 0, because the update divides by it. One NaN or Inf in a state makes the scale of its block
NaN, and with it the whole block in the next step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rounding import sqrt

BLOCK = 128  # elements; the last block of a tensor may be shorter
MOMENT, VARIANCE = torch.int8, torch.uint8  # dtypes of the codes of exp_avg and exp_avg_sq
STATE_LIMITS = {MOMENT: 127.0, VARIANCE: 255.0}  # the largest code
DELTA_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

_NORMAL = torch.finfo(torch.float32).tiny  # a subnormal scale has too few bits to divide by


def blocks_of(numel: int) -> int:
    """The number of blocks, and so of scales, in a tensor of `numel` elements."""
    return -(-numel // BLOCK)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a state of this shape: one per block. If rows are whole blocks, the scales are laid
    out row by row, so that they can be sharded like the tensor."""
    if len(shape) > 1 and shape[-1] % BLOCK == 0:
        return (*shape[:-1], shape[-1] // BLOCK)
    return (blocks_of(math.prod(shape)),)


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """Expand float32 scales to the shape of `like`: the scale of each element."""
    return scale.flatten().repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def in_blocks(x: Tensor) -> Tensor:
    """float32 [blocks, BLOCK]: the elements of `x`, padded with zeros."""
    padded = torch.zeros(blocks_of(x.numel()) * BLOCK, dtype=torch.float32, device=x.device)
    padded[: x.numel()] = x.flatten()
    return padded.view(-1, BLOCK)


# States


def decode_state(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 values of the codes' shape."""
    c = codes.to(torch.int32)
    if codes.dtype == MOMENT:
        return (c * c.abs()).to(torch.float32) * spread(scale, codes)
    root = c.to(torch.float32) * spread(scale, codes)
    return root * root


def encode_state(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encode float32 `x` as codes of `dtype` (MOMENT or VARIANCE), nearest on the square-root scale, and scales."""
    coded = x.abs() if dtype == MOMENT else sqrt(x)  # proportional to the scale
    magnitudes = in_blocks(coded).view(torch.int32) & 0x7FFFFFFF  # a root that is NaN may have a sign
    largest = magnitudes.amax(1).view(torch.float32)  # compared as integers, a NaN is the largest
    limit = STATE_LIMITS[dtype]
    scale = largest / (limit**2 if dtype == MOMENT else limit)
    scale = torch.where((largest != 0) & (scale < _NORMAL), _NORMAL, scale)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    scaled = coded * spread(torch.where(scale > 0, 1 / scale, 0.0), x)
    nearest = (sqrt(scaled) if dtype == MOMENT else scaled).round()
    code = torch.where(nearest < limit, nearest, limit)
    if dtype == VARIANCE:
        code = torch.where((code == 0) & (coded > 0), 1.0, code)
    return torch.where(x < 0, -code, code).to(dtype), scale


# Deltas


def decode_delta(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 values of the codes' shape, as a new contiguous tensor."""
    flat = codes.reshape(-1).to(torch.float32, copy=True)
    whole = flat.numel() // BLOCK * BLOCK
    flat[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK, None])
    flat[whole:].mul_(scale[whole // BLOCK :])
    return flat.view(codes.shape)


def encode_delta(delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encode a delta as codes of `dtype` (a key of DELTA_LIMITS), of its shape, and float32 [blocks] scales.

    A code is delta/scale in float32, rounded to nearest, ties to even. A block of zeros, or of values so small that its
    scale would be subnormal, has scale 0 and codes 0. A NaN or Inf makes its block's scale NaN or Inf.
    """
    blocks = in_blocks(delta.detach())
    scale = blocks.abs().amax(1) / DELTA_LIMITS[dtype]
    scale.masked_fill_(scale < _NORMAL, 0)
    divisors = scale.masked_fill(scale == 0, math.inf)
    blocks.div_(divisors[:, None]).add_(0.0)  # + 0 turns -0 into 0
    if dtype == torch.int8:
        blocks.round_()
    return blocks.view(-1)[: delta.numel()].to(dtype).view(delta.shape), scale
