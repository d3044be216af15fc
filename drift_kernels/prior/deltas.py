"""What a prior's folder says of its deltas, and where they lie: names of files, the record, and reading a delta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PriorFormatError
from ..formats.blocks import BLOCK, DELTA_LIMITS, blocks_of
from .files import StoredTensor
from .quantized import Box, QuantizedDelta, scales_name

RECORD_NAME = "drift_prior.json"
PRIOR_INDEX_NAME = "prior.safetensors.index.json"
FORMAT, VERSION = "drift_prior", 2  # version 1 knew float32 and bfloat16 alone, and no stored_cosine

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, *DELTA_LIMITS)}


@dataclass(frozen=True)
class DeltaInfo:
    """What a prior knows about one delta without reading it.

    `dtype` is that of the delta as stored: float32, bfloat16, or that of its codes, int8 or float8_e4m3fn. `delta_norm`
    is the norm of the delta as stored, `param_norm` the norm of the base's weight, and `cosine` the cosine of the
    expert's weight and the base's; `stored_cosine` is the cosine of the delta as stored and the exact one. None stands
    for a cosine with a vector of zeros. For deltas that were given in memory the last three are None, and
    `stored_cosine` also for deltas stored in float32 or bfloat16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    delta_norm: float
    param_norm: float | None = None
    cosine: float | None = None
    stored_cosine: float | None = None


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


def read_infos(folder: Path, record: Mapping[str, Any]) -> dict[str, DeltaInfo]:
    """What the record in `folder` says of each delta. Raises PriorFormatError for a foreign or damaged one."""
    if record.get("format") != FORMAT or record.get("version") not in range(1, VERSION + 1):
        found = f"format {record.get('format')!r}, version {record.get('version')!r}"
        raise PriorFormatError(
            f"{folder / RECORD_NAME}: expected format {FORMAT!r}, version 1 to {VERSION}; found {found}"
        )
    try:
        dtype = DTYPES[record["dtype"]]
        return {
            name: DeltaInfo(
                shape=tuple(row["shape"]),
                dtype=dtype,
                delta_norm=row["delta_norm"],
                param_norm=row["param_norm"],
                cosine=row["cosine"],
                stored_cosine=row.get("stored_cosine"),
            )
            for name, row in record["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise PriorFormatError(f"{folder / RECORD_NAME}: lacks or garbles {error}") from error
