"""Partial local copies of files on the Hub, which hold only the parts that have been needed so far.

Such a copy is a sparse file of the whole file's size, with a list of the parts that it holds. They are kept when a
build is interrupted; the next one, of the same or of other tensors, fetches only what is missing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock

from ..errors import CheckpointError
from .ranges import NoRangesError, RemoteFile, Version, first_line
from .reading import OpenFiles
from .writing import sync, write_json

Range = tuple[int, int]

_OPEN_FILES = 16
_STREAMS = 4  # requests at a time
_REQUEST = 32 << 20  # bytes per request
_GAP = 1 << 17  # unneeded bytes up to this many are fetched too, because another request costs more
_HEAD = 1 << 17  # bytes that are enough for most headers


class PartialFile:
    """The partial copy of a file on the Hub. Several threads may fetch at once."""

    def __init__(self, remote: RemoteFile, folder: Path) -> None:
        name = remote.name.replace("/", "--")
        self.remote, self.path, self._list = remote, folder / name, folder / f"{name}.json"
        self.version: Version | None = None
        self._held: list[Range] = []
        self._lock = Lock()
        self.look_again()

    def look_again(self) -> None:
        """Take note of what others have fetched: another build, or another role of this one."""
        with self._lock, suppress(OSError, ValueError, KeyError, TypeError):  # ignore a damaged list
            found = json.loads(self._list.read_text())
            held, version = (
                [(int(begin), int(end)) for begin, end in found["held"]],
                Version(found["size"], found["etag"]),
            )
            if self.path.stat().st_size == version.size and self.version in (None, version):
                self._held, self.version = _joined([*self._held, *held]), version

    def missing(self, begin: int, end: int) -> list[Range]:
        """The parts of a range that are not in the copy."""
        with self._lock:
            end = min(end, self.version.size) if self.version else end
            found = []
            for held_begin, held_end in self._held:
                if held_end <= begin or held_begin >= end:
                    continue
                if held_begin > begin:
                    found.append((begin, held_begin))
                begin = held_end
            return [*found, (begin, end)] if begin < end else found

    def fetch(self, begin: int, end: int, stopping: Event, arrived: Callable[[int], object]) -> None:
        """Fetch a range, and call `arrived` with the number of bytes of each piece. Raises the errors of
        RemoteFile.read, after setting `stopping`."""
        done, descriptor = begin, os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            for data in self.remote.read(begin, end, self._check, stopping):
                _write(descriptor, data, done)
                done += len(data)
                arrived(len(data))
        except BaseException:
            stopping.set()
            raise
        finally:
            try:
                self._keep(descriptor, begin, done)
            finally:
                os.close(descriptor)

    def _check(self, version: Version) -> None:
        with self._lock:
            if self.version is None:
                self.version = version
            if self.version == version:
                return
            self._held, self.version = [], None
            self._list.unlink(missing_ok=True)
        raise CheckpointError(f"{self.remote}: the file on the Hub has changed since parts of it were fetched: retry")

    def _keep(self, descriptor: int, begin: int, end: int) -> None:
        """Record that the copy holds a range, once it is on disk."""
        version = self.version
        if begin == end or version is None:  # None: the file has changed meanwhile
            return
        os.ftruncate(descriptor, version.size)
        sync(descriptor, self.path)
        self.look_again()
        with self._lock:
            if self.version == version:
                self._held = _joined([*self._held, (begin, end)])
                new = self._list.with_name(f"{self._list.name}.{secrets.token_hex(4)}")
                write_json(new, {**version._asdict(), "held": self._held})
                new.replace(self._list)


class PartialFiles(OpenFiles):
    """Files of a folder, some of which are on the Hub: their parts are fetched before they are read."""

    def __init__(self, remote: Mapping[Path, RemoteFile], folder: Path) -> None:
        """Fetch the headers of the `remote` files, which are missing locally. `folder`: where their parts are kept.
        Raises NoRangesError if the server only sends whole files."""
        super().__init__(_OPEN_FILES)
        self._partial = {path: PartialFile(file, folder) for path, file in remote.items()}
        self._fetch([(file, *part) for file in self._partial.values() for part in file.missing(0, _HEAD)])

    def has(self, path: Path) -> bool:
        return path in self._partial or super().has(path)

    def size(self, path: Path) -> int:
        if path not in self._partial:
            return super().size(path)
        version = self._partial[path].version
        assert version is not None
        return version.size

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        if (file := self._partial.get(path)) is None:
            super().read(path, view, offset)
            return
        end = offset + len(view)
        self._fetch([(file, *part) for part in file.missing(offset, end)])
        super().read(file.path, view, offset)

    def fetch(self, places: Iterable[tuple[Path, int, int]]) -> None:
        wanted: dict[Path, list[Range]] = defaultdict(list)
        for path, begin, end in places:
            if path in self._partial:
                wanted[path].append((begin, end))
        requests = []
        for path, ranges in sorted(wanted.items()):
            file = self._partial[path]
            file.look_again()
            missing = [part for begin, end in _joined(ranges) for part in file.missing(begin, end)]
            for begin, end in _joined(missing, _GAP):
                requests += [(file, start, min(start + _REQUEST, end)) for start in range(begin, end, _REQUEST)]
        if requests:
            self._fetch(requests, sum(end - begin for _, begin, end in requests))

    def _fetch(self, requests: list[tuple[PartialFile, int, int]], shown: int = 0) -> None:
        """Make several requests at a time. If one fails or the command is stopped, what has arrived is kept."""
        from huggingface_hub.utils import tqdm

        if not requests:
            return
        stopping, (file, *_) = Event(), requests[0]
        with (
            tqdm(total=shown, unit="B", unit_scale=True, desc=file.remote.repository, disable=not shown or None) as bar,
            ThreadPoolExecutor(min(_STREAMS, len(requests))) as pool,
        ):
            futures = [pool.submit(file.fetch, begin, end, stopping, bar.update) for file, begin, end in requests]
            try:
                for future in futures:
                    future.result()
            except (CheckpointError, NoRangesError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno is not None:  # an error of the local disk
                    raise
                raise CheckpointError(f"{file.remote}: cannot be fetched from the Hub ({first_line(error)})") from error
            finally:
                stopping.set()
                pool.shutdown(cancel_futures=True)


def _joined(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """Sort the ranges, and join those that overlap, touch, or are at most `gap` apart."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
