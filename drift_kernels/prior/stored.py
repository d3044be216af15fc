"""Deltas in the files of a prior: reading them, whole or in part, and verifying them."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, PriorError, PriorFormatError
from ..formats.blocks import BLOCK, DELTA_LIMITS, blocks_of
from .deltas import Delta, norm_of, tensors_of
from .files import StoredTensor, TensorType, byte_view
from .low_rank import LowRankDelta, factor_names
from .norms import CHUNK
from .quantized import Box, QuantizedDelta, scales_name
from .record import PRIOR_INDEX_NAME, RECORD_NAME, DeltaInfo, recorded_checksums

_NORM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class StoredDelta(ABC):
    """A delta in a prior's files, and what is recorded about it.

    `checksums` holds the CRC-32 of each of its tensors, in hexadecimal; None for priors from before there were any.
    """

    name: str
    info: DeltaInfo
    checksums: Sequence[str] | None

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file that holds the delta."""

    @abstractmethod
    def read(self, box: Box | None = None) -> Delta:
        """Read the delta, or the part in a box, without reading rows outside it. Raises CheckpointError if the file is
        missing or too short."""

    @abstractmethod
    def measure(self, with_norm: bool) -> tuple[Sequence[int], float | None]:
        """The CRC-32 of each tensor, in the order of `checksums`, and the norm, if asked for, from every byte. Raises
        CheckpointError as `read`, and with the norm PriorError for impossible scales."""

    def load(self, box: Box | None = None) -> Delta:
        """Read the delta, or the part in a box, and check it: all of it against the checksums and the norm, of a part
        only the scales. Raises PriorFormatError."""
        with self._errors_named():
            delta = self.read(box)
            if isinstance(delta, QuantizedDelta):
                delta.check_scales()
        if box is None:
            self._compare(*_measured(delta, with_norm=True))
        return delta

    def check(self) -> None:
        """Read every byte, in constant memory, and compare the checksums; without any, the norm. Raises
        PriorFormatError."""
        with self._errors_named():
            crcs, found_norm = self.measure(with_norm=self.checksums is None)
        self._compare(crcs, found_norm)

    def fault(self) -> str | None:
        """What is wrong with every byte, the checksums and the norm, as a sentence; None if nothing."""
        try:
            return self._difference(*self.measure(with_norm=True))
        except CheckpointError as error:
            return str(error)
        except PriorError as error:
            return f"damaged: {error}"

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise PriorFormatError(f"{self.name} of the prior: {error}") from error
        except PriorError as error:
            raise PriorFormatError(f"{self.path}: {self.name} is damaged: {error}") from error

    def _compare(self, crcs: Sequence[int], found_norm: float | None) -> None:
        if fault := self._difference(crcs, found_norm):
            raise PriorFormatError(f"{self.path}: {self.name} is {fault}")

    def _difference(self, crcs: Sequence[int], found_norm: float | None) -> str | None:
        found = [f"{crc:08x}" for crc in crcs]
        if self.checksums is not None and found != list(self.checksums):
            return f"damaged: its checksum is {' '.join(found)}, recorded {' '.join(map(str, self.checksums))}"
        return None if found_norm is None else norm_fault(found_norm, self.info.delta_norm)


def layout_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None) -> dict[str, TensorType]:
    """The stored tensors of a delta, in the order of the file. Scales come first, so that they are aligned."""
    if rank is not None:
        (rows, columns), (left, right) = shape, factor_names(name)
        return {left: (dtype, (rows, rank)), right: (dtype, (rank, columns))}
    if dtype in DELTA_LIMITS:
        return {scales_name(name): (torch.float32, (blocks_of(math.prod(shape)),)), name: (dtype, shape)}
    return {name: (dtype, shape)}


def find_deltas(
    folder: Path, record: Mapping[str, Any], infos: Mapping[str, DeltaInfo], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredDelta]:
    """The recorded deltas of a prior, in `stored`. Raises PriorFormatError if its tensors are not as recorded."""
    deltas = {
        name: _find_delta(folder, name, info, recorded_checksums(record, name), stored) for name, info in infos.items()
    }
    known = {part for name, i in infos.items() for part in layout_of(name, i.shape, i.dtype, i.rank)}
    for name in stored.keys() - known:
        raise PriorFormatError(f"{folder}: {RECORD_NAME} and {PRIOR_INDEX_NAME} disagree about {name}")
    return deltas


def _find_delta(
    folder: Path, name: str, info: DeltaInfo, checksums: Sequence[str] | None, stored: Mapping[str, StoredTensor]
) -> StoredDelta:
    layout = layout_of(name, info.shape, info.dtype, info.rank)
    for tensor, (dtype, shape) in layout.items():
        if tensor not in stored:
            raise PriorFormatError(f"{folder}: {RECORD_NAME} and {PRIOR_INDEX_NAME} disagree about {tensor}")
        if (stored[tensor].dtype, stored[tensor].shape) != (dtype, shape):
            found = f"{stored[tensor].dtype} {list(stored[tensor].shape)}"
            raise PriorFormatError(f"{folder}: {tensor} is recorded as {dtype} {list(shape)}, but stored as {found}")
    places = [stored[tensor] for tensor in layout]
    if info.rank is not None:
        return StoredFactors(name, info, checksums, *places)
    return StoredValues(name, info, checksums, *reversed(places))


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

    def measure(self, with_norm: bool) -> tuple[Sequence[int], float | None]:
        return _measured(self.read(), with_norm)


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

    def measure(self, with_norm: bool) -> tuple[Sequence[int], float | None]:
        crcs, norms = [0] if self.scales is None else [0, 0], [0.0]
        for begin in range(0, self.values.numel, CHUNK):
            end = min(begin + CHUNK, self.values.numel)
            parts = [self.values.read_flat(begin, end)]
            if self.scales is not None:
                parts.append(self.scales.read_flat(begin // BLOCK, blocks_of(end)))
            crcs = [zlib.crc32(byte_view(part), crc) for part, crc in zip(parts, crcs, strict=True)]
            if with_norm:
                delta = parts[0] if self.scales is None else QuantizedDelta(*parts)
                if isinstance(delta, QuantizedDelta):
                    delta.check_scales()
                norms.append(norm_of(delta))
        return crcs, math.hypot(*norms) if with_norm else None


def norm_fault(found: float, recorded: float) -> str | None:
    """What is wrong with a delta of norm `found`; None if that is the recorded norm."""
    if math.isclose(found, recorded, rel_tol=_NORM_TOLERANCE):
        return None
    return f"damaged: its norm is {found:.7g}, recorded {recorded:.7g}"


def _measured(delta: Delta, with_norm: bool) -> tuple[Sequence[int], float | None]:
    crcs = [zlib.crc32(byte_view(part.reshape(-1))) for part in tensors_of(delta)]
    return crcs, norm_of(delta) if with_norm else None
