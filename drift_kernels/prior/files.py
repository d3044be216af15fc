"""Reading safetensors files in pieces.

The format is eight bytes (the header's length), a JSON header, and the tensors' bytes. Reading it here, into memory
that the caller owns and reuses, keeps the memory of a build constant for any tensor size, and allows hashing the same
bytes on the way. Writing it here (writing.py) needs no whole shard in memory.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .foreign import what_begins
from .reading import OpenFiles, read_json

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
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit

TensorType = tuple[torch.dtype, tuple[int, ...]]
Layout = Mapping[str, TensorType]


class Place(NamedTuple):
    """A run of a file's bytes."""

    path: Path
    begin: int
    end: int


class Source(ABC):
    """A tensor of a checkpoint, whose elements can be read run by run."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # as it is read; the file's code, if torch does not have the dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @abstractmethod
    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        """Fill `flat` (1-D, contiguous, of this dtype) with the elements from `start` on. Raises CheckpointError."""

    @abstractmethod
    def places(self) -> Iterator[Place]:
        """The places of all bytes that reading the tensor needs."""

    def read_flat_from(self, files: OpenFiles, begin: int, end: int) -> Tensor:
        """Read the elements from `begin` to `end`, in flat order, as a new tensor."""
        if not isinstance(self.dtype, torch.dtype):
            raise CheckpointError(f"{next(self.places()).path}: torch has no dtype {self.dtype}")
        flat = torch.empty(end - begin, dtype=self.dtype, device="cpu")
        self.read_from(files, flat, begin)
        return flat


@dataclass(frozen=True)
class StoredTensor(Source):
    """A tensor in a file: the offset of its first byte, and its number of bytes."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    offset: int
    nbytes: int

    def read(self) -> Tensor:
        """Read the whole tensor, as a new one."""
        return self.read_flat(0, self.numel).view(self.shape)

    def read_flat(self, begin: int, end: int) -> Tensor:
        """Read the elements from `begin` to `end`, in flat order, as a new tensor."""
        with closing(OpenFiles(1)) as files:
            return self.read_flat_from(files, begin, end)

    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        files.read(self.path, byte_view(flat), self.offset + start * flat.element_size())

    def places(self) -> Iterator[Place]:
        yield Place(self.path, self.offset, self.offset + self.nbytes)


@dataclass(frozen=True)
class TensorFile:
    """The checked header of a .safetensors file: the place of every tensor."""

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def inspect(cls, path: Path, files: OpenFiles | None = None) -> TensorFile:
        """Read only the header. Raises CheckpointError if the file is damaged, truncated, or of another format."""
        if files is None:
            with closing(OpenFiles(1)) as files:
                return cls.inspect(path, files)
        size = files.size(path)
        head = bytearray(min(size, 64))
        files.read(path, memoryview(head), 0)
        length = int.from_bytes(head[:8], "little")
        if length > min(size - 8, _MAX_HEADER):
            what = what_begins(bytes(head))
            found = f"not a safetensors file but {what}" if what else "truncated or not a safetensors file"
            raise CheckpointError(f"{path} ({size} bytes): {found}")
        header = bytearray(length)
        files.read(path, memoryview(header), 8)
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: cannot read its header ({error})") from error
        end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
        if end != size:
            state = "truncated" if size < end else "damaged"
            raise CheckpointError(f"{path}: {state}: expected {end} bytes from its header, but the file has {size}")
        return cls(path, tensors)


def inspect_shards(folder: Path, index_name: str, files: OpenFiles | None = None) -> dict[str, StoredTensor]:
    """Find the place of every tensor in an index from the headers of the shards. Raises CheckpointError."""
    if files is None:
        with closing(OpenFiles(1)) as files:
            return inspect_shards(folder, index_name, files)
    weight_map = shards_by_name(folder / index_name)
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not files.has(folder / shard) and not (folder / shard).is_symlink():
            raise CheckpointError(f"{folder}: {shard} is missing, but listed in {index_name}")
        shards[shard] = TensorFile.inspect(folder / shard, files)
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(f"{folder / shard}: {name} is missing, but listed in {index_name}")
    return {name: shards[shard].tensors[name] for name, shard in weight_map.items()}


def shards_by_name(index: Path) -> dict[str, str]:
    """Read the map from tensors to shards in an index. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: it has no weight_map")
    return weight_map


def boxes_of(flat: Tensor, start: int, columns: int) -> Iterator[tuple[Tensor, int, int]]:
    """Split a run of elements, from `start` on, of a matrix with `columns` columns into boxes: a view [rows, width] of
    `flat`, and the row and column where it begins. Partial rows at the start and end of the run are separate boxes."""
    done = 0
    while done < flat.numel():
        row, column = divmod(start + done, columns)
        left = flat.numel() - done
        rows = 1 if column else max(left // columns, 1)
        width = min(columns - column, left)
        yield flat[done : done + rows * width].view(rows, width), row, column
        done += rows * width


def size_in_bytes(tensor: TensorType) -> int:
    """The number of bytes of a tensor of this dtype and shape."""
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
        raise ValueError(f"{name}: {code}{list(shape)} does not match bytes {begin} to {end}")
    return StoredTensor(path, shape, dtype, data_start + begin, nbytes)
