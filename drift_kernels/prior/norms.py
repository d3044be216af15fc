"""Norms of long vectors, in float64 and in little memory."""

from __future__ import annotations

import math

from torch import Tensor

CHUNK = 1 << 19  # elements at a time: bounds the memory of every pass, and roughly fits the caches

_ROW = 1024


def norm(tensor: Tensor) -> float:
    """The Euclidean norm of a floating-point tensor of any shape, dtype and device, computed in float64, CHUNK elements
    at a time. NaN gives NaN. It does not depend on the number of threads: each row is summed by one."""
    total = 0.0
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        squares = piece.cpu().double().square()
        whole = squares.numel() // _ROW * _ROW
        total += squares[:whole].view(-1, _ROW).sum(1).sum().item() + squares[whole:].sum().item()
    return math.sqrt(total)
