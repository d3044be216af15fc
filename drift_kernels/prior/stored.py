"""Deltas in the files of a prior: reading them, whole or in part, and verifying them."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, PriorError, PriorFormatError
from ..formats.blocks import BLOCK, DELTA_LIMITS, blocks_of
from .deltas import Delta, norm_of, tensors_of
from .files import StoredTensor, TensorType, byte_view
from .low_rank import LowRankDelta, factor_names
from .norms import CHUNK
from .quantized import Box, QuantizedDelta, scales_name
from .record import PRIOR_INDEX_NAME, RECORD_NAME, DeltaInfo

_NORM_TOLERANCE = 1e-5


class StoredDelta(ABC):
    """A delta in a prior's files."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file that holds the delta."""

    @abstractmethod
    def read(self, box: Box | None = None) -> Delta:
        """Read the delta, or the part in a box, without reading rows outside it. Raises CheckpointError if the file is
        missing or too short."""

    @abstractmethod
    def fault(self, info: DeltaInfo, checksums: Sequence[str] | None) -> str | None:
        """What is wrong with the delta; None if nothing is. Reads every byte, and compares with the recorded checksums,
        if there are any, and the recorded norm."""


def layout_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None) -> dict[str, TensorType]:
    """The stored tensors of a delta, in the order of the file. Scales come first, so that they are aligned."""
    if rank is not None:
        (rows, columns), (left, right) = shape, factor_names(name)
        return {left: (dtype, (rows, rank)), right: (dtype, (rank, columns))}
    if dtype in DELTA_LIMITS:
        return {scales_name(name): (torch.float32, (blocks_of(math.prod(shape)),)), name: (dtype, shape)}
    return {name: (dtype, shape)}


def find_delta(folder: Path, name: str, info: DeltaInfo, stored: Mapping[str, StoredTensor]) -> StoredDelta:
    """Find a delta by name among the tensors of a prior. Raises PriorFormatError if they are not as recorded."""
    layout = layout_of(name, info.shape, info.dtype, info.rank)
    for tensor, (dtype, shape) in layout.items():
        if tensor not in stored:
            raise PriorFormatError(f"{folder}: {RECORD_NAME} and {PRIOR_INDEX_NAME} disagree about {tensor}")
        if (stored[tensor].dtype, stored[tensor].shape) != (dtype, shape):
            found = f"{stored[tensor].dtype} {list(stored[tensor].shape)}"
            raise PriorFormatError(f"{folder}: {tensor} is recorded as {dtype} {list(shape)}, but stored as {found}")
    places = [stored[tensor] for tensor in layout]
    return StoredFactors(*places) if info.rank is not None else StoredValues(*reversed(places))


@dataclass(frozen=True)
class StoredFactors(StoredDelta):
    """A low-rank delta."""

    left: StoredTensor
    right: StoredTensor

    @property
    def path(self) -> Path:
        return self.left.path

    def read(self, box: Box | None = None) -> LowRankDelta:
        if box is None:
            return LowRankDelta(self.left.read(), self.right.read())
        rank, rows = self.left.shape[1], box[0]
        left = self.left.read_flat(rows.start * rank, rows.stop * rank).view(-1, rank)
        return LowRankDelta(left, self.right.read()[:, box[1]].contiguous())

    def fault(self, info: DeltaInfo, checksums: Sequence[str] | None) -> str | None:
        try:
            delta = self.read()
        except CheckpointError as error:
            return str(error)
        return _fault([zlib.crc32(byte_view(part)) for part in tensors_of(delta)], checksums, norm_of(delta), info)


@dataclass(frozen=True)
class StoredValues(StoredDelta):
    """Values, or codes and their scales."""

    values: StoredTensor
    scales: StoredTensor | None = None

    @property
    def path(self) -> Path:
        return self.values.path

    def read(self, box: Box | None = None) -> Tensor | QuantizedDelta:
        if box is None:
            values = self.values.read()
            return values if self.scales is None else QuantizedDelta(values, self.scales.read())
        row = math.prod(self.values.shape[1:])
        begin, end = box[0].start * row, box[0].stop * row
        shape, inner = (box[0].stop - box[0].start, *self.values.shape[1:]), (slice(None), *box[1:])
        if self.scales is None:
            return self.values.read_flat(begin, end).view(shape)[inner].contiguous()
        first, last = begin // BLOCK, blocks_of(end)
        codes = self.values.read_flat(first * BLOCK, min(last * BLOCK, self.values.numel))
        delta = QuantizedDelta(codes, self.scales.read_flat(first, last))
        if begin % BLOCK == 0 and codes.numel() == end - begin:
            return QuantizedDelta(codes.view(shape), delta.scales).part(inner)
        begin -= first * BLOCK
        return delta.expand()[begin : begin + math.prod(shape)].view(shape)[inner].contiguous()

    def fault(self, info: DeltaInfo, checksums: Sequence[str] | None) -> str | None:
        """Checks CHUNK elements at a time."""
        crcs, norms = [0] if self.scales is None else [0, 0], [0.0]
        try:
            for begin in range(0, self.values.numel, CHUNK):
                end = min(begin + CHUNK, self.values.numel)
                parts = [self.values.read_flat(begin, end)]
                if self.scales is not None:
                    parts.append(self.scales.read_flat(begin // BLOCK, blocks_of(end)))
                crcs = [zlib.crc32(byte_view(part), crc) for part, crc in zip(parts, crcs, strict=True)]
                norms.append(norm_of(parts[0] if self.scales is None else QuantizedDelta(*parts)))
                if self.scales is not None:
                    QuantizedDelta(*parts).check_scales()
        except CheckpointError as error:
            return str(error)
        except PriorError as error:
            return f"damaged: {error}"
        return _fault(crcs, checksums, math.hypot(*norms), info)


def norm_fault(found: float, recorded: float) -> str | None:
    """What is wrong with a delta of norm `found`; None if that is the recorded norm."""
    if math.isclose(found, recorded, rel_tol=_NORM_TOLERANCE):
        return None
    return f"damaged: its norm is {found:.7g}, recorded {recorded:.7g}"


def _fault(crcs: Sequence[int], checksums: Sequence[str] | None, found_norm: float, info: DeltaInfo) -> str | None:
    found = [f"{crc:08x}" for crc in crcs]
    if checksums is not None and found != list(checksums):
        return f"damaged: its checksum is {' '.join(found)}, recorded {' '.join(map(str, checksums))}"
    return norm_fault(found_norm, info.delta_norm)
