"""Reading files: either all requested bytes or an error with the reason, with few files open at a time."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import CheckpointError
from .foreign import what_begins


class OpenFiles:
    """A cache of files open for reading: those in use, and the most recently used others, at most `most` in total.

    Several threads may read at once. The cache is limited because sharded checkpoints have hundreds of files, and
    processes have a limit on open files.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._files: dict[Path, FileIO] = {}  # the most recently used is last
        self._users: Counter[Path] = Counter()

    @contextmanager
    def using(self, path: Path) -> Iterator[FileIO]:
        """Yield the file, which stays open until the block ends. Raises CheckpointError if it cannot be opened."""
        with self._lock:
            file = self._files.pop(path, None) or open_file(path)
            self._files[path] = file
            self._users[path] += 1
            idle = [other for other in self._files if not self._users[other]]
            for other in idle[: max(0, len(self._files) - self._most)]:
                self._files.pop(other).close()
        try:
            yield file
        finally:
            with self._lock:
                self._users[path] -= 1

    def has(self, path: Path) -> bool:
        """Whether a file exists. Raises CheckpointError if that cannot be determined."""
        return exists(path)

    def size(self, path: Path) -> int:
        """The size in bytes. Raises CheckpointError."""
        with self.using(path) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        """Fill `view` with the file's bytes from `offset` on. Raises CheckpointError if there are too few."""
        with self.using(path) as file:
            read_exactly(file, view, offset)

    def fetch(self, places: Iterable[tuple[Path, int, int]]) -> None:
        """Prepare these bytes (path, begin, end) for reading. Local files need no preparation."""

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def open_file(path: Path) -> FileIO:
    """Open a file. Raises CheckpointError if it cannot be opened."""
    try:
        return FileIO(path)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error


def read_exactly(file: FileIO, view: memoryview, offset: int) -> None:
    """Fill `view` with the file's bytes from `offset` on. Raises CheckpointError if there are too few, or if they
    cannot be read."""
    path = Path(str(file.name))
    while view:
        try:
            count = os.preadv(file.fileno(), [view], offset)
            size = offset if count else os.fstat(file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(unreadable(path, error)) from error
        if not count and size > offset:
            raise CheckpointError(f"{path}: cannot be read: got none of its {size - offset} bytes from {offset} on")
        if not count:
            raise CheckpointError(f"{path}: damaged: the file ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises CheckpointError if there is none."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {what_begins(raw) or error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def exists(path: Path) -> bool:
    """Whether a file or folder exists. Raises CheckpointError if that cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    return True


def unreadable(path: Path, error: OSError) -> str:
    """The message for a system error while reading a file, which does not mean that the file is damaged."""
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"{path}: a link to {path.readlink()}, which does not exist: download the model again"
    if error.errno == errno.ENOENT:
        return f"{path}: does not exist, or not any more"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path}: no permission to read it"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{path}: cannot be opened, because too many files are open: raise the limit (ulimit -n)"
    return f"{path}: cannot be read: {error.strerror}"
