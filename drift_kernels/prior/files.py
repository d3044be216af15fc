"""Safetensors files and sharded checkpoints, read and written in pieces.

The format is eight bytes (the header's length), a JSON header, and the tensors' bytes. Reading it here, into memory
that the caller owns and reuses, keeps a build's memory flat whatever a tensor's size, and lets the same bytes be hashed
in passing; writing it here needs no whole shard in memory.
"""

from __future__ import annotations

import json
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
from .names import some

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
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_ALIGNMENT = 64

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
        with _open(self.path) as file:
            _read_exactly(file, byte_view(flat), self.offset + begin * flat.element_size())
        return flat


@dataclass(frozen=True)
class TensorFile:
    """A .safetensors file's checked header: its bytes, and the place of every tensor."""

    path: Path
    header: bytes
    tensors: dict[str, StoredTensor]

    @classmethod
    def inspect(cls, path: Path) -> TensorFile:
        """Read the header alone. Foreign, damaged and truncated files raise CheckpointError."""
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = bytearray(length)
            _read_exactly(file, memoryview(header), 8)
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
        return cls(path, bytes(header), tensors)


class TensorFileWriter:
    """Writes a .safetensors file: the layout first, then every tensor's bytes, each tensor front to back."""

    def __init__(self, path: Path, layout: Layout) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins: dict[str, int] = {}
        end = 0
        for name, tensor in layout.items():
            begins[name], end = end, end + size_in_bytes(tensor)
            dtype, shape = tensor
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        start = 8 + len(header)
        self._file = FileIO(path, "w")
        self._next = {name: start + begin for name, begin in begins.items()}
        self._write(memoryview(len(header).to_bytes(8, "little") + header), 0)

    def append(self, name: str, flat: Tensor) -> None:
        """Append the bytes of a 1-D, contiguous CPU tensor to those that the tensor `name` has already."""
        view = byte_view(flat)
        self._write(view, self._next[name])
        self._next[name] += len(view)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count


class Checkpoint:
    """A local folder of safetensors files, sharded or not, with its config.json; every shard stays open until close().

    Several threads may read at once.

    Raises CheckpointError when the folder holds no safetensors checkpoint, or one that is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        if (folder / INDEX_NAME).exists():
            self.files, self.tensors = inspect_shards(folder, INDEX_NAME)
        elif (folder / SINGLE_NAME).exists():
            self.files = [TensorFile.inspect(folder / SINGLE_NAME)]
            self.tensors = self.files[0].tensors
        else:
            raise CheckpointError(f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}, {_what_lies_in(folder)}")
        self._handles = {file.path: _open(file.path) for file in self.files}

    def read_into(self, flat: Tensor, tensor: StoredTensor, start: int = 0) -> None:
        """Fill `flat` (1-D, contiguous, the tensor's dtype) with the tensor's elements from `start` on."""
        _read_exactly(self._handles[tensor.path], byte_view(flat), tensor.offset + start * flat.element_size())

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inspect_shards(folder: Path, index_name: str) -> tuple[list[TensorFile], dict[str, StoredTensor]]:
    """The headers of the shards that an index names, and the place of every tensor in it. Raises CheckpointError."""
    weight_map = read_json(folder / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name}: no weight_map in it")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder}: {index_name} names {shard}, which is not there")
        shards[shard] = TensorFile.inspect(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(f"{folder / shard}: lacks {name}, which {index_name} places there")
    return list(shards.values()), {name: shards[shard].tensors[name] for name, shard in weight_map.items()}


def size_in_bytes(tensor: TensorType) -> int:
    """The bytes of a tensor of this dtype and shape."""
    dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError when there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def byte_view(flat: Tensor) -> memoryview:
    """The bytes of a 1-D, contiguous CPU tensor, writable through the view."""
    return flat.view(torch.uint8).numpy().data


def _open(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _read_exactly(file: FileIO, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if not count:
            raise CheckpointError(f"{file.name!s}: the file ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count


def _stored_tensor(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    shape, (begin, end), code = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
    dtype = _DTYPES.get(code, code)
    nbytes = math.prod(shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else end - begin
    if not 0 <= begin <= end or nbytes != end - begin:
        raise ValueError(f"{name}: {code}{list(shape)} does not fill bytes {begin} to {end}")
    return StoredTensor(path, shape, dtype, data_start + begin, nbytes)


def _what_lies_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "the folder is empty"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"found safetensors files without an index: {some(shards)}"
    if any(name.endswith(".bin") for name in names):
        return "found PyTorch .bin files: save the model again with save_pretrained, as safetensors"
    return f"found {some(names)}"
