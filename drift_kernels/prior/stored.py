"""Deltas as they lie in a prior's files: read whole, in part, and verified."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, PriorError, PriorFormatError
from ..formats.blocks import BLOCK, DELTA_LIMITS, blocks_of
from .deltas import norm_of
from .files import StoredTensor, byte_view
from .norms import CHUNK
from .quantized import Box, QuantizedDelta, scales_name
from .record import PRIOR_INDEX_NAME, RECORD_NAME, DeltaInfo

_NORM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class StoredDelta:
    """Where a delta lies: its values or codes, and the scales of codes."""

    values: StoredTensor
    scales: StoredTensor | None

    @classmethod
    def find(cls, folder: Path, name: str, info: DeltaInfo, stored: Mapping[str, StoredTensor]) -> StoredDelta:
        """The delta of a name among the tensors of a prior. Raises PriorFormatError if they are not as recorded."""
        expected = {name: (info.dtype, info.shape)}
        if info.dtype in DELTA_LIMITS:
            expected[scales_name(name)] = torch.float32, (blocks_of(math.prod(info.shape)),)
        for tensor, (dtype, shape) in expected.items():
            if tensor not in stored:
                raise PriorFormatError(f"{folder}: {RECORD_NAME} and {PRIOR_INDEX_NAME} disagree about {tensor}")
            if (stored[tensor].dtype, stored[tensor].shape) != (dtype, shape):
                found = f"{stored[tensor].dtype} {list(stored[tensor].shape)}"
                raise PriorFormatError(f"{folder}: {tensor} is recorded as {dtype} {list(shape)}, stored as {found}")
        return cls(stored[name], stored.get(scales_name(name)) if len(expected) > 1 else None)

    def read(self, box: Box | None = None) -> Tensor | QuantizedDelta:
        """The delta, or the part in a box, for which it reads no row beyond. Raises CheckpointError when its file is
        gone or too short."""
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
        """What is wrong with the delta, if anything: every byte is read, CHUNK elements at a time, and compared with
        the recorded checksums, where there are any, and the recorded norm."""
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
        found = [f"{crc:08x}" for crc in crcs]
        if checksums is not None and found != list(checksums):
            return f"damaged: its checksum is {' '.join(found)}, recorded {' '.join(map(str, checksums))}"
        return norm_fault(math.hypot(*norms), info.delta_norm)


def norm_fault(found: float, recorded: float) -> str | None:
    """What is wrong with a delta of this norm, if anything."""
    if math.isclose(found, recorded, rel_tol=_NORM_TOLERANCE):
        return None
    return f"damaged: its norm is {found:.7g}, recorded {recorded:.7g}"
