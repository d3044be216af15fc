"""Low-rank deltas: two factors, whose product is the delta.

delta = left @ right      [m, n] = [m, r] @ [r, n]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PriorError
from .norms import CHUNK
from .quantized import Box

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """A matrix as a product of `left` [m, r] and `right` [r, n], both bfloat16 or both float32, contiguous, on the same
    device.

    Raises PriorError if the factors do not fit each other. They are not checked for NaN and Inf, but `norm` is then not
    finite.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise PriorError(f"factors must be [m, r] and [r, n], got {list(left.shape)} and {list(right.shape)}")
        if left.dtype != right.dtype or left.dtype not in _DTYPES or left.device != right.device:
            raise PriorError(
                "factors must be both bfloat16 or both float32, on the same device, got "
                f"{left.dtype} on {left.device} and {right.dtype} on {right.device}"
            )
        if not (left.is_contiguous() and right.is_contiguous()):
            raise PriorError("factors must be contiguous")

    @property
    def shape(self) -> torch.Size:
        """The shape of the delta: [m, n]."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def rank(self) -> int:
        """r, the inner dimension; the rank of the matrix may be lower."""
        return self.left.shape[1]

    def to(self, device: torch.device | str, *, copy: bool = False) -> LowRankDelta:
        """Return the delta on `device`; itself if it is there already, unless `copy`."""
        return LowRankDelta(self.left.to(device, copy=copy), self.right.to(device, copy=copy))

    def expand(self) -> Tensor:
        """Return the delta as a new float32 tensor [m, n].

        Products are summed in float64 and rounded once, so that the result depends on no torch setting (TF32, autocast,
        precision of float32 products), and is the same if only a part is expanded.
        """
        rows, columns = self.shape
        delta = torch.empty(rows, columns, dtype=torch.float32, device=self.device)
        right = self.right.double()
        for tile, left in zip(delta.split(_tile(columns)), self.left.split(_tile(columns)), strict=True):
            tile.copy_(left.double() @ right)
        return delta

    def part(self, box: Box) -> LowRankDelta:
        """The part in a box: rows of `left`, columns of `right`."""
        rows, columns = box
        return LowRankDelta(self.left[rows].contiguous(), self.right[:, columns].contiguous())

    def norm(self) -> float:
        """norm(delta), computed in float64 from the factors: norm(delta)^2 = <left^T left, right right^T>."""
        square = (_gram(self.left) * _gram(self.right.t())).sum().item()
        return math.sqrt(max(square, 0.0)) if square == square else math.nan


def factor_names(name: str) -> tuple[str, str]:
    """The names that the factors of the delta `name` are stored under."""
    return f"{name}.left", f"{name}.right"


def _gram(tall: Tensor) -> Tensor:
    """tall^T tall, float64 [r, r], a few rows at a time."""
    rank = tall.shape[1]
    total = torch.zeros(rank, rank, dtype=torch.float64, device=tall.device)
    for piece in tall.split(_tile(rank)):
        total += piece.double().t() @ piece.double()
    return total


def _tile(columns: int) -> int:
    """The number of rows of a tile of about CHUNK elements."""
    return max(CHUNK // max(columns, 1), 1)
