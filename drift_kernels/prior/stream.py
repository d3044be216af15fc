"""The arithmetic of a build: from checkpoints to pieces of deltas and their norms, in constant memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..errors import PriorError
from ..formats.blocks import DELTA_LIMITS, blocks_of
from .arithmetic import Products, checksum, dot, subtract, subtract_quantized
from .checkpoint import Checkpoint
from .norms import CHUNK
from .pairing import Pair
from .quantized import scales_name
from .threads import WORKERS, in_order


@dataclass(frozen=True)
class Piece:
    """A run of elements of one tensor. Beyond the common vocabulary (not `paired`), only the base has elements."""

    pair: Pair
    start: int
    count: int
    paired: bool

    @property
    def roles(self) -> Iterable[str]:
        return self.pair.sources if self.paired else ("base",)


@dataclass(frozen=True)
class Workplace:
    """Reusable memory for one piece in work: the bytes that are read, and the bytes of the delta."""

    raw: dict[str, Tensor]
    delta: Tensor

    def delta_of(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """The memory for the delta, as float32 if it will be quantised."""
        dtype = torch.float32 if dtype in DELTA_LIMITS else dtype
        return self.delta[: piece.count * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class Result:
    stored: dict[str, Tensor]  # name in the prior's files -> 1-D
    products: Products
    checksums: dict[str, bytes]  # of the bytes that were read, by role


class DeltaStream:
    """Reads, subtracts and measures pieces on a few threads, and returns them in order.

    `digests` holds, by role, a sha256 over the checksums of all bytes that were read. It does not depend on how the
    weights are sharded, and changes if they are damaged.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint], dtype: torch.dtype) -> None:
        self.digests = {role: hashlib.sha256() for role in checkpoints}
        self._checkpoints = checkpoints
        self._minus = "expert", "reference" if "reference" in checkpoints else "base"
        self._dtype = dtype
        self._workplaces = [
            Workplace(
                raw={role: torch.empty(CHUNK * 8, dtype=torch.uint8, device="cpu") for role in checkpoints},
                delta=torch.empty(CHUNK * 4, dtype=torch.uint8, device="cpu"),
            )
            for _ in range(WORKERS + 1)
        ]
        self._products: dict[str, Products] = {}  # over the common part
        self._base_squares: dict[str, float] = {}  # over the whole tensor

    def deltas(self, pairs: Iterable[Pair]) -> Generator[tuple[Piece, dict[str, Tensor]], None, None]:
        """Yield the deltas of `pairs`, end to end, in pieces: 1-D tensors to append to tensors of the prior's files.

        A piece is valid until the next one is requested. Raises PriorError, naming the tensor, if a delta contains NaN
        or Inf.
        """
        with closing(self._results(pairs, self._dtype)) as results:
            for piece, result in results:
                self._note(piece, result)
                yield piece, result.stored

    def exact(self, pair: Pair, first: bool = True) -> Generator[Tensor, None, None]:
        """Yield the delta of `pair` in float32, in pieces as from `deltas`. If `first` is false, the delta was read
        before, and does not count again in digests and measures."""
        with closing(self._results([pair], torch.float32)) as results:
            for piece, result in results:
                if first:
                    self._note(piece, result)
                yield result.stored[pair.name]

    def measure(self, pair: Pair) -> dict[str, Any]:
        """The norm of the stored delta, the norm of the base's weight, the cosine of expert and base over their common
        elements, and for a quantised delta its cosine with the exact one."""
        products = self._products.get(pair.name, Products())
        return {
            "delta_norm": math.sqrt(products.delta_delta),
            "param_norm": math.sqrt(self._base_squares.get(pair.name, 0.0)),
            "cosine": _cosine(products.expert_base, products.expert_expert, products.base_base),
            "stored_cosine": _cosine(products.delta_exact, products.delta_delta, products.exact_exact),
        }

    def _results(self, pairs: Iterable[Pair], dtype: torch.dtype) -> Generator[tuple[Piece, Result], None, None]:
        def work(given: tuple[Piece, Workplace]) -> Result:
            return self._work(*given, dtype)

        # There are as many workplaces as pieces that are in work or were just returned.
        with closing(in_order(work, zip(pieces_of(pairs), cycle(self._workplaces)))) as results:
            for (piece, _), result in results:
                yield piece, result

    def _work(self, piece: Piece, workplace: Workplace, dtype: torch.dtype) -> Result:
        tensors, checksums = {}, {}
        for role in piece.roles:
            tensors[role] = self._read(role, piece, workplace.raw[role])
            checksums[role] = checksum(tensors[role])
        delta = workplace.delta_of(piece, dtype)
        if piece.paired:
            stored, products = self._difference(piece, tensors, delta, dtype)
        else:
            stored, products = (
                self._zeros(piece, delta, dtype),
                Products(base_base=dot(tensors["base"], tensors["base"])),
            )
        return Result(stored, products, checksums)

    def _difference(
        self, piece: Piece, tensors: Mapping[str, Tensor], delta: Tensor, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], Products]:
        """Compute the delta. A role that lacks the tensor, a bias, counts as zero."""
        name, base = piece.pair.name, tensors["base"]
        expert, origin = (tensors[role] if role in tensors else torch.zeros_like(base) for role in self._minus)
        sources = expert, base, origin
        if dtype not in DELTA_LIMITS:
            return {name: delta}, subtract(*sources, delta)
        quantized, products = subtract_quantized(*sources, delta, dtype)
        return {name: quantized.codes, scales_name(name): quantized.scales}, products

    def _zeros(self, piece: Piece, delta: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """A piece of zeros. If quantised, it has the scales of blocks that begin in it; a block shared with the
        previous piece has its scale there."""
        name, end = piece.pair.name, piece.start + piece.count
        if dtype not in DELTA_LIMITS:
            return {name: delta.zero_()}
        scales = torch.zeros(blocks_of(end) - blocks_of(piece.start), dtype=torch.float32, device="cpu")
        codes = torch.zeros(piece.count, dtype=dtype, device="cpu")
        return {name: codes, scales_name(name): scales}

    def _read(self, role: str, piece: Piece, raw: Tensor) -> Tensor:
        source = piece.pair.sources[role]
        assert isinstance(source.dtype, torch.dtype)
        flat = raw[: piece.count * source.dtype.itemsize].view(source.dtype)
        self._checkpoints[role].read_into(flat, source, piece.start)
        return flat

    def _note(self, piece: Piece, result: Result) -> None:
        name, base_square = piece.pair.name, result.products.base_base
        if not math.isfinite(base_square + result.products.delta_delta):
            raise PriorError(f"{name} contains NaN or Inf in the checkpoints, or overflows in the prior's dtype")
        self._base_squares[name] = self._base_squares.get(name, 0.0) + base_square
        if piece.paired:
            self._products[name] = self._products.get(name, Products()).plus(result.products)
        for role, value in result.checksums.items():
            self.digests[role].update(value)


def _cosine(product: float, square: float, other_square: float) -> float | None:
    scale = math.sqrt(square * other_square)
    return product / scale if scale else None


def pieces_of(pairs: Iterable[Pair]) -> Iterator[Piece]:
    """Yield the tensors of `pairs`, cut into pieces of CHUNK elements, and also where their common part ends.

    If a common part ends within a block of a quantised delta, the rest of the block is zero and does not change scales.
    """
    for pair in pairs:
        for begin, end, paired in ((0, pair.common, True), (pair.common, pair.numel, False)):
            for start in range(begin, end, CHUNK):
                yield Piece(pair, start, min(CHUNK, end - start), paired)
