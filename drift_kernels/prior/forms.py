"""The forms in which deltas are stored: values, codes with scales, or factors of low rank."""

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
    """How deltas are stored: matrices in factors of `rank`, if there is one and the factors are smaller than the
    matrix, all else in `dtype`."""

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
        """What is stored of these deltas: large elements come first, and so lie aligned."""
        parts = [layout_of(name, shape, self.dtype_of(shape), self.rank_of(shape)) for name, shape in shapes.items()]
        tensors = [item for part in parts for item in part.items()]
        return dict(sorted(tensors, key=lambda item: -item[1][0].itemsize))

    def warnings(self, shapes: Shapes) -> list[str]:
        """What a rank leaves as it is, where more was to be expected."""
        if self.rank is None:
            return []
        whole = [name for name, shape in shapes.items() if self.rank_of(shape) is None]
        stacks = [name for name in whole if len(shapes[name]) > 2]
        found = []
        if stacks:
            found.append(f"{len(stacks)} stacks of matrices, such as {stacks[0]}, are not stored in factors but whole")
        if len(whole) == len(shapes):
            found.append(f"no matrix is larger than its factors of rank {self.rank}: all are stored whole")
        return found
