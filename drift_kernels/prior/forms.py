"""The forms in which a build stores deltas: values, codes with scales, or factors of low rank."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .files import Layout
from .low_rank import factor_names
from .pairing import Pair
from .singular import Rows, factorise, rows_of, tile_rows
from .stored import layout_of
from .stream import DeltaStream

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_IN_MEMORY = 1 << 27  # elements; a larger matrix is read again whenever its rows are needed


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
        """What is stored of deltas of these shapes: large elements come first, and so lie aligned."""
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


class FormedDeltas:
    """The deltas of a stream, in the form in which they are stored."""

    def __init__(self, stream: DeltaStream, form: Form) -> None:
        self._stream = stream
        self._form = form
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")  # for one matrix after the other
        self._measures: dict[str, dict[str, Any]] = {}  # of low-rank deltas

    def deltas(self, pairs: Iterable[Pair]) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        """As `DeltaStream.deltas`: how many elements are done, and what to append to which tensors of the files."""
        for whole, some in groupby(pairs, lambda pair: self._form.rank_of(pair.shape) is None):
            if whole:
                with closing(self._stream.deltas(some)) as pieces:
                    for piece, stored in pieces:
                        yield piece.count, stored
            else:
                for pair in some:
                    yield pair.numel, self._factors(pair)

    def measure(self, pair: Pair) -> dict[str, Any]:
        """As `DeltaStream.measure`; of a low-rank delta also what `DeltaInfo` says of it."""
        return self._stream.measure(pair) | self._measures.get(pair.name, {})

    def _factors(self, pair: Pair) -> dict[str, Tensor]:
        rank = self._form.rank_of(pair.shape)
        assert rank is not None
        rows = self._rows(pair)
        exact_norm = self._stream.measure(pair)["delta_norm"]
        delta, fit = factorise(rows, pair.shape[1], rank, exact_norm, pair.name)
        self._measures[pair.name] = {
            "delta_norm": delta.norm(),
            "stored_cosine": fit.cosine,
            "rank": rank,
            "kept_energy": fit.kept_energy,
            "exact_norm": exact_norm,
        }
        return dict(zip(factor_names(pair.name), (delta.left.view(-1), delta.right.view(-1)), strict=True))

    def _rows(self, pair: Pair) -> Rows:
        """The rows of the exact delta, which has been read once."""
        if pair.numel > _IN_MEMORY:
            for _ in self._stream.exact(pair):
                pass
            return lambda: self._read_rows(pair)
        if self._memory.numel() < pair.numel:
            self._memory = torch.empty(pair.numel, dtype=torch.float32, device="cpu")
        flat, done = self._memory[: pair.numel], 0
        for piece in self._stream.exact(pair):
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
        return rows_of(flat.view(pair.shape))

    def _read_rows(self, pair: Pair) -> Iterator[Tensor]:
        """The rows, of which each tile has memory of its own."""
        columns, left = pair.shape[1], pair.numel
        with closing(self._stream.exact(pair, first=False)) as pieces:
            piece = torch.empty(0, dtype=torch.float32, device="cpu")
            while left:
                tile = torch.empty(min(tile_rows(columns) * columns, left), dtype=torch.float32, device="cpu")
                done = 0
                while done < tile.numel():
                    if not piece.numel():
                        piece = next(pieces)
                    count = min(piece.numel(), tile.numel() - done)
                    tile[done : done + count] = piece[:count]
                    piece, done = piece[count:], done + count
                left -= tile.numel()
                yield tile.view(-1, columns)
