"""Safetensors files and sharded checkpoints, read in pieces.

The format is eight bytes (the header's length), a JSON header, and the tensors' bytes. Reading it here, into memory
that the caller owns and reuses, keeps a build's memory flat whatever a tensor's size, and lets the same bytes be hashed
in passing; writing it here (writing.py) needs no whole shard in memory.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .foreign import what_begins, what_lies_in
from .reading import OpenFiles, exists, open_file, read_exactly, read_json, unreadable

logger = logging.getLogger("drift_kernels")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_BAND = 1 << 16  # elements of a transposed matrix that are read at a time
_OPEN_FILES = 16  # of a checkpoint; names in order are in few shards at a time

TensorType = tuple[torch.dtype, tuple[int, ...]]
Layout = Mapping[str, TensorType]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file and its first byte's offset. `dtype` stays the file's code when torch has none."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self.read_flat(0, self.numel).view(self.shape)

    def read_flat(self, begin: int, end: int) -> Tensor:
        """Its elements from `begin` to `end`, in flat order, in memory of their own."""
        if not isinstance(self.dtype, torch.dtype):
            raise CheckpointError(f"{self.path}: torch has no dtype {self.dtype}")
        flat = torch.empty(end - begin, dtype=self.dtype, device="cpu")
        with open_file(self.path) as file:
            self.read_from(file, flat, begin)
        return flat

    def read_from(self, file: FileIO, flat: Tensor, start: int) -> None:
        """Fill `flat` (1-D, contiguous, of this dtype) with the elements from `start` on, out of the open file."""
        read_exactly(file, byte_view(flat), self.offset + start * flat.element_size())


@dataclass(frozen=True)
class TransposedMatrix(StoredTensor):
    """A matrix that lies transposed in a file, within lines of `stride` elements: element [r, c] is the r-th of line c,
    counted from `offset`."""

    stride: int

    def read_from(self, file: FileIO, flat: Tensor, start: int) -> None:
        """Rows that `flat` begins or ends within are filled alone, so that no more than `flat` is needed."""
        columns, done = self.shape[1], 0
        while done < flat.numel():
            row, column = divmod(start + done, columns)
            left = flat.numel() - done
            rows = 1 if column else max(left // columns, 1)
            width = min(columns - column, left)
            target = flat[done : done + rows * width].view(rows, width)
            self._fill(file, target, row, column)
            done += rows * width

    def _fill(self, file: FileIO, target: Tensor, row: int, column: int) -> None:
        """The box that begins at [row, column], a few of the file's lines at a time."""
        rows, width = target.shape
        lines = max(_BAND // self.stride, 1)
        band = torch.empty(min(lines, width) * self.stride, dtype=target.dtype, device="cpu")
        for begin in range(0, width, lines):
            count = min(lines, width - begin)
            read = band[: (count - 1) * self.stride + rows]
            place = (column + begin) * self.stride + row
            read_exactly(file, byte_view(read), self.offset + place * band.element_size())
            target[:, begin : begin + count] = read.as_strided((rows, count), (1, self.stride))


@dataclass(frozen=True)
class TensorFile:
    """A .safetensors file's checked header: the place of every tensor."""

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def inspect(cls, path: Path) -> TensorFile:
        """Read the header alone. Foreign, damaged and truncated files raise CheckpointError."""
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = bytearray(min(size, 64))
            read_exactly(file, memoryview(head), 0)
            length = int.from_bytes(head[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                what = what_begins(bytes(head))
                found = f"not a safetensors file but {what}" if what else "truncated or not a safetensors file"
                raise CheckpointError(f"{path} ({size} bytes): {found}")
            header = bytearray(length)
            read_exactly(file, memoryview(header), 8)
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: its header cannot be read ({error})") from error
        end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
        if end != size:
            state = "truncated" if size < end else "damaged"
            raise CheckpointError(f"{path}: {state}: its header promises {end} bytes, the file has {size}")
        return cls(path, tensors)


class Checkpoint:
    """A local folder of safetensors files, sharded or not, with its config.json.

    Of model.safetensors and an index it reads the first, as transformers does (4.57 and 5).
    Several threads may read at once; few shards are open at a time, and those until close().

    Raises CheckpointError when the folder holds no safetensors checkpoint, or one that is incomplete, damaged, or
    cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json") if exists(folder / "config.json") else {}
        if exists(folder / SINGLE_NAME):
            self.tensors = TensorFile.inspect(folder / SINGLE_NAME).tensors
            if exists(folder / INDEX_NAME) and not _names_only_the_single_file(folder / INDEX_NAME):
                logger.warning(
                    "%s: %s is read, as transformers does, and %s beside it is not", folder, SINGLE_NAME, INDEX_NAME
                )
        elif exists(folder / INDEX_NAME):
            self.tensors = inspect_shards(folder, INDEX_NAME)
        else:
            raise CheckpointError(f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}, {_content(folder)}")
        self._files = OpenFiles(_OPEN_FILES)

    def read_into(self, flat: Tensor, tensor: StoredTensor, start: int = 0) -> None:
        """Fill `flat` (1-D, contiguous, the tensor's dtype) with the tensor's elements from `start` on."""
        with self._files.using(tensor.path) as file:
            tensor.read_from(file, flat, start)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inspect_shards(folder: Path, index_name: str) -> dict[str, StoredTensor]:
    """The place of every tensor of an index, by its shards' headers. Raises CheckpointError."""
    weight_map = shards_by_name(folder / index_name)
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not exists(folder / shard) and not (folder / shard).is_symlink():
            raise CheckpointError(f"{folder}: {index_name} names {shard}, which is not there")
        shards[shard] = TensorFile.inspect(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(f"{folder / shard}: lacks {name}, which {index_name} places there")
    return {name: shards[shard].tensors[name] for name, shard in weight_map.items()}


def shards_by_name(index: Path) -> dict[str, str]:
    """Tensor -> shard, as an index has it. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it")
    return weight_map


def size_in_bytes(tensor: TensorType) -> int:
    """The bytes of a tensor of this dtype and shape."""
    dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize


def byte_view(flat: Tensor) -> memoryview:
    """The bytes of a 1-D, contiguous CPU tensor, writable through the view."""
    return flat.view(torch.uint8).numpy().data


def _stored_tensor(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    shape, (begin, end), code = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
    dtype = _DTYPES.get(code, code)
    nbytes = math.prod(shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else end - begin
    if not 0 <= begin <= end or nbytes != end - begin:
        raise ValueError(f"{name}: {code}{list(shape)} does not fill bytes {begin} to {end}")
    return StoredTensor(path, shape, dtype, data_start + begin, nbytes)


def _names_only_the_single_file(index: Path) -> bool:
    try:
        return set(shards_by_name(index).values()) == {SINGLE_NAME}
    except CheckpointError:
        return False


def _content(folder: Path) -> str:
    try:
        return what_lies_in(folder)
    except OSError as error:
        return f"but {unreadable(folder, error)}"
