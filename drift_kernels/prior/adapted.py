"""Weights with a LoRA or DoRA adapter, which are merged while reading.

    LoRA:  W + scale * left @ right
    DoRA:  m * V / norm(V), with V = W + scale * left @ right and the norm of each output

in float32, without rounding to the base's dtype: the change by an adapter is often smaller than the last bit of a
bfloat16 weight. So the delta to the same base is exactly this change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from .files import Place, Source
from .norms import CHUNK
from .reading import OpenFiles


@dataclass(frozen=True)
class LowRankChange:
    """scale * left @ right, which LoRA adds to a matrix. `magnitude` is DoRA's m, one per row of the stored matrix or,
    if that is transposed (`by_column`), one per column."""

    left: Source
    right: Source
    scale: float
    magnitude: Source | None = None
    by_column: bool = False


@dataclass(frozen=True)
class AdaptedWeight(Source):
    """A matrix and the change that an adapter makes to it."""

    weight: Source
    change: LowRankChange
    _norms: list[Tensor] = field(default_factory=list, compare=False)  # the norms of columns, once computed
    _lock: Lock = field(default_factory=Lock, compare=False)

    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.weight.shape

    def places(self) -> Iterator[Place]:
        change = self.change
        for source in (self.weight, change.left, change.right, change.magnitude):
            if source is not None:
                yield from source.places()

    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        columns = self.shape[1]
        first, last = start // columns, -(-(start + flat.numel()) // columns)
        rows = self._sum(files, first, last)
        if self.change.magnitude is not None:
            rows *= self._factors(files, first, rows)
        begin = start - first * columns
        flat.copy_(rows.view(-1)[begin : begin + flat.numel()])

    def _sum(self, files: OpenFiles, first: int, last: int) -> Tensor:
        """Rows of W + scale * left @ right."""
        (_, columns), rank, change = self.shape, self.change.right.shape[0], self.change
        left = change.left.read_flat_from(files, first * rank, last * rank).float().view(-1, rank)
        right = change.right.read_flat_from(files, 0, rank * columns).float().view(rank, columns)
        rows = self.weight.read_flat_from(files, first * columns, last * columns).float().view(-1, columns)
        return rows.add_(left @ right, alpha=change.scale)

    def _factors(self, files: OpenFiles, first: int, rows: Tensor) -> Tensor:
        """m / norm(V), for rows of V from row `first` on."""
        magnitude = self.change.magnitude
        assert magnitude is not None
        if self.change.by_column:
            return magnitude.read_flat_from(files, 0, self.shape[1]).float() / self._column_norms(files)
        magnitudes = magnitude.read_flat_from(files, first, first + len(rows)).float()
        return (magnitudes / torch.linalg.vector_norm(rows, dim=1)).unsqueeze(1)

    def _column_norms(self, files: OpenFiles) -> Tensor:
        """The norms of the columns of V. The whole matrix is read once to compute them."""
        with self._lock:
            if not self._norms:
                rows, columns = self.shape
                step = max(CHUNK // columns, 1)
                squares = torch.zeros(columns, dtype=torch.float64, device="cpu")
                for first in range(0, rows, step):
                    squares += self._sum(files, first, min(first + step, rows)).double().square().sum(0)
                self._norms.append(squares.sqrt().float())
            return self._norms[0]


@dataclass(frozen=True)
class AdaptedBias(Source):
    """bias + scale * change."""

    bias: Source
    change: Source
    scale: float

    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.bias.shape

    def places(self) -> Iterator[Place]:
        yield from self.bias.places()
        yield from self.change.places()

    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        end = start + flat.numel()
        flat.copy_(self.bias.read_flat_from(files, start, end))
        flat.add_(self.change.read_flat_from(files, start, end).float(), alpha=self.scale)
