"""Norms of long vectors, in float64 and in little memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 19  # elements at a time: bounds the memory of every pass, and roughly fits the caches


def norm(tensor: Tensor) -> float:
    """The Euclidean norm of a floating-point tensor of any shape, dtype and device, computed in float64, CHUNK elements
    at a time. NaN gives NaN."""
    total = 0.0
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        values = piece.cpu().double()
        total += torch.dot(values, values).item()
    return math.sqrt(total)
