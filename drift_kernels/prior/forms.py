"""The storage forms of deltas: values, codes with scales, or low-rank factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .files import Layout
from .stored import layout_of

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Form:
    """How deltas are stored: matrices as factors of `rank`, if it is given and the factors are smaller than the matrix;
    all else in `dtype`."""

    dtype: torch.dtype
    rank: int | None = None

    def rank_of(self, shape: Shape) -> int | None:
        if self.rank is None or len(shape) != 2:
            return None
        rows, columns = shape
        return self.rank if self.rank * (rows + columns) < rows * columns else None

    def dtype_of(self, shape: Shape) -> torch.dtype:
        return self.dtype if self.rank_of(shape) is None else torch.bfloat16

    def layout(self, shapes: Shapes) -> Layout:
        """The stored tensors of these deltas. Those with large elements come first, so that all are aligned."""
        parts = [layout_of(name, shape, self.dtype_of(shape), self.rank_of(shape)) for name, shape in shapes.items()]
        tensors = [item for part in parts for item in part.items()]
        return dict(sorted(tensors, key=lambda item: -item[1][0].itemsize))

    def warnings(self, shapes: Shapes) -> list[str]:
        """Warnings about deltas that are unexpectedly not stored as factors."""
        if self.rank is None:
            return []
        whole = [name for name, shape in shapes.items() if self.rank_of(shape) is None]
        stacks = [name for name in whole if len(shapes[name]) > 2]
        found = []
        if stacks:
            found.append(f"{len(stacks)} stacks of matrices, such as {stacks[0]}, are stored whole, not as factors")
        if len(whole) == len(shapes):
            found.append(f"all matrices are stored whole: none is larger than its factors of rank {self.rank}")
        return found
