"""Matrices within another tensor of a checkpoint, such as a fused stack of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .files import Place, Source, boxes_of
from .reading import OpenFiles

_BAND = 1 << 16  # elements of a transposed matrix that are read at a time


@dataclass(frozen=True)
class Part(Source):
    """A matrix whose elements are contiguous in `whole`, from `begin` on."""

    whole: Source
    shape: tuple[int, ...]
    begin: int

    @property
    def dtype(self) -> torch.dtype | str:  # type: ignore[override]
        return self.whole.dtype

    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        self.whole.read_from(files, flat, self.begin + start)

    def places(self) -> Iterator[Place]:
        return self.whole.places()


@dataclass(frozen=True)
class TransposedPart(Part):
    """A matrix that is stored transposed in `whole`, in lines of `stride` elements: element [r, c] is the r-th of line
    c, counted from `begin`."""

    stride: int

    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        """Read one box at a time, which needs little memory besides `flat`."""
        for box, row, column in boxes_of(flat, start, self.shape[1]):
            self._fill(files, box, row, column)

    def _fill(self, files: OpenFiles, target: Tensor, row: int, column: int) -> None:
        """Read the box that begins at [row, column], a few lines at a time."""
        rows, width = target.shape
        lines = max(_BAND // self.stride, 1)
        band = torch.empty(min(lines, width) * self.stride, dtype=target.dtype, device="cpu")
        for begin in range(0, width, lines):
            count = min(lines, width - begin)
            read = band[: (count - 1) * self.stride + rows]
            self.whole.read_from(files, read, self.begin + (column + begin) * self.stride + row)
            target[:, begin : begin + count] = read.as_strided((rows, count), (1, self.stride))
