"""Reading files: all that was asked for or an error that says what is wrong, and few files open at a time."""

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
    """Files open for reading: those in use, and of others those used last, at most `most` together.

    Several threads may read at once. Sharded checkpoints have hundreds of files, and processes a limit of open ones.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._files: dict[Path, FileIO] = {}  # the one used last comes last
        self._users: Counter[Path] = Counter()

    @contextmanager
    def using(self, path: Path) -> Iterator[FileIO]:
        """The file, open until the block ends. Raises CheckpointError when it cannot be opened."""
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
        """Raises CheckpointError when that cannot be told."""
        return exists(path)

    def size(self, path: Path) -> int:
        """In bytes. Raises CheckpointError."""
        with self.using(path) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        """Fill `view` with the file's bytes from `offset` on. Raises CheckpointError when it has fewer."""
        with self.using(path) as file:
            read_exactly(file, view, offset)

    def fetch(self, places: Iterable[tuple[Path, int, int]]) -> None:
        """Make these bytes (path, begin, end) ready to be read, which they are in a local file."""

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def open_file(path: Path) -> FileIO:
    """Raises CheckpointError when the file cannot be opened."""
    try:
        return FileIO(path)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error


def read_exactly(file: FileIO, view: memoryview, offset: int) -> None:
    """Fill `view` with the file's bytes from `offset` on. Raises CheckpointError when it has fewer, or gives fewer."""
    path = Path(str(file.name))
    while view:
        try:
            count = os.preadv(file.fileno(), [view], offset)
            size = offset if count else os.fstat(file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(unreadable(path, error)) from error
        if not count and size > offset:
            raise CheckpointError(f"{path}: cannot be read: no byte came of its {size - offset} from {offset} on")
        if not count:
            raise CheckpointError(f"{path}: damaged: the file ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError when there is none."""
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
    """Whether a file or folder is there. Raises CheckpointError when that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    return True


def unreadable(path: Path, error: OSError) -> str:
    """Why the system does not give a file's bytes: which says nothing against the bytes."""
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"{path}: a link to {path.readlink()}, which is not there: download the model again"
    if error.errno == errno.ENOENT:
        return f"{path}: is not there, or not any more"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path}: no permission to read it"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{path}: cannot be opened, too many files are open: raise the limit (ulimit -n)"
    return f"{path}: cannot be read: {error.strerror}"
