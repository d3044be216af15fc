"""The deltas of a build in their storage form."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .forms import Form
from .low_rank import factor_names
from .pairing import Pair
from .singular import Rows, factorise, rows_of, tile_rows
from .stream import DeltaStream

_IN_MEMORY = 1 << 27  # elements; a larger matrix is read again each time its rows are needed


class FormedDeltas:
    """The deltas of a stream in their storage form."""

    def __init__(self, stream: DeltaStream, form: Form) -> None:
        self._stream = stream
        self._form = form
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")  # reused for each matrix
        self._measures: dict[str, dict[str, Any]] = {}  # of low-rank deltas

    def deltas(self, pairs: Iterable[Pair]) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        """Like `DeltaStream.deltas`, but yields the number of elements with the tensors to append to the files."""
        for whole, some in groupby(pairs, lambda pair: self._form.rank_of(pair.shape) is None):
            if whole:
                with closing(self._stream.deltas(some)) as pieces:
                    for piece, stored in pieces:
                        yield piece.count, stored
            else:
                for pair in some:
                    yield pair.numel, self._factors(pair)

    def measure(self, pair: Pair) -> dict[str, Any]:
        """Like `DeltaStream.measure`; for a low-rank delta also its fields of `DeltaInfo`."""
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
        """The rows of the exact delta, after reading it once."""
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
        """Yield the rows; each tile is a new tensor."""
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
