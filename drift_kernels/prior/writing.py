"""Writing files that are on disk when a build ends; safetensors files are written piece by piece."""

from __future__ import annotations

import errno
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .files import CODES, Layout, byte_view, size_in_bytes

Writer = TypeVar("Writer", bound="FileWriter")

logger = logging.getLogger("drift_kernels")

_ALIGNMENT = 64
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


class FileWriter:
    """Writes a file, in any order and from several threads. Failed writes raise OSError with the file's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = FileIO(path, "w")

    def write(self, view: memoryview, offset: int) -> None:
        with _naming(self._path):
            while view:
                count = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[count:], offset + count

    def finish(self) -> None:
        """Flush the file to disk, and close it."""
        with self._file:
            sync(self._file.fileno(), self._path)

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class TensorFileWriter(FileWriter):
    """Writes a .safetensors file: first the layout, then the bytes of the tensors, each front to back.

    `checksums` holds the CRC-32 of the bytes of each tensor so far.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins: dict[str, int] = {}
        end = 0
        for name, tensor in layout.items():
            begins[name], end = end, end + size_in_bytes(tensor)
            dtype, shape = tensor
            entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        start = 8 + len(header)
        self.checksums = dict.fromkeys(layout, 0)
        self._next = {name: start + begin for name, begin in begins.items()}
        super().__init__(path)
        self.write(memoryview(len(header).to_bytes(8, "little") + header), 0)

    def append(self, name: str, flat: Tensor) -> None:
        """Append the bytes of a 1-D, contiguous CPU tensor to the tensor `name`."""
        view = byte_view(flat)
        self.checksums[name] = zlib.crc32(view, self.checksums[name])
        self.write(view, self._next[name])
        self._next[name] += len(view)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, and flush it to disk."""
    with path.open("w") as file, _naming(path):
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        sync(file.fileno(), path)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


def sync(descriptor: int, path: Path) -> None:
    """Call fsync, and ignore errors of file systems that do not support it, as some network and FUSE file systems."""
    try:
        with _naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        logger.debug("%s: the file system does not support fsync (%s)", path, error.strerror)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors of calls on its descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
