"""The representations of a delta (a tensor, codes with scales, or two factors), and functions for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.blocks import blocks_of
from .low_rank import LowRankDelta
from .norms import norm
from .quantized import QuantizedDelta

Delta = Tensor | QuantizedDelta | LowRankDelta
"""Tensors are float32 or bfloat16. All have `shape`, `dtype`, `device` and `to`."""


def expanded(delta: Delta) -> Tensor:
    """The delta as a tensor; a tensor is returned unchanged."""
    return delta if isinstance(delta, Tensor) else delta.expand()


def norm_of(delta: Delta) -> float:
    """norm(delta)."""
    return norm(delta) if isinstance(delta, Tensor) else delta.norm()


def tensors_of(delta: Delta) -> tuple[Tensor, ...]:
    """The tensors that make up a delta."""
    if isinstance(delta, Tensor):
        return (delta,)
    return (delta.codes, delta.scales) if isinstance(delta, QuantizedDelta) else (delta.left, delta.right)


def with_rows(delta: Delta, rows: int) -> Delta:
    """Extend a delta to `rows` rows with zeros."""
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(_extended(delta.left, (rows, delta.rank)), delta.right)
    shape = (rows, *delta.shape[1:])
    if isinstance(delta, Tensor):
        return _extended(delta, shape)
    return QuantizedDelta(_extended(delta.codes, shape), _extended(delta.scales, (blocks_of(math.prod(shape)),)))


def _extended(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    extended = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    extended[: len(tensor)] = tensor
    return extended
