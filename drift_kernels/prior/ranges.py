"""Runs of a file's bytes from the Hub, through the Hub client's own session: its token, its proxies, its endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

from ..errors import CheckpointError

_RETRIES = 5  # without a byte in between
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds; the first is doubled each time, the last if a server asks for more
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Version(NamedTuple):
    """What must not change between two requests for one file."""

    size: int
    etag: str | None


class NoRangesError(Exception):
    """The server sends whole files only."""


class _TryAgainError(Exception):
    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class RemoteFile:
    """A file of one commit of a repository."""

    repository: str
    commit: str
    name: str

    def read(self, begin: int, end: int, check: Callable[[Version], None], stopping: Event) -> Iterator[bytes]:
        """The bytes from `begin` to `end`, or to where the file ends, in pieces, until `stopping` is set. `check` is
        told the file's version before the first byte of each response.

        What fails in passing is tried again, from the byte on that is missing. Raises NoRangesError, CheckpointError
        for what does not pass, and what `check` raises.
        """
        failures = 0

        def checked(version: Version) -> None:
            nonlocal end
            end = min(end, version.size)
            check(version)

        while begin < end and not stopping.is_set():
            try:
                for data in self._responded(begin, end, checked):
                    begin, failures = begin + len(data), 0
                    yield data
                if begin < end:
                    raise _TryAgainError(f"the answer ended {end - begin} bytes too early")
            except Exception as error:
                if not _is_transient(error):
                    raise
                failures += 1
                if failures > _RETRIES:
                    raise CheckpointError(
                        f"{self}: not fetched from the Hub, after {_RETRIES} more attempts ({first_line(error)}); what "
                        "has arrived is kept, and the next build goes on from there"
                    ) from error
                wait = getattr(error, "wait", None) or _FIRST_WAIT * 2 ** (failures - 1)
                stopping.wait(min(wait, _LONGEST_WAIT))

    def _responded(self, begin: int, end: int, check: Callable[[Version], None]) -> Iterator[bytes]:
        """What one request brings."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repository, self.name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        options: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
        with get_session().stream("GET", url, headers=headers, **options) as response:
            if response.status_code in _TRANSIENT:
                raise _TryAgainError(f"HTTP {response.status_code}", _seconds(response.headers.get("Retry-After")))
            hf_raise_for_status(response)
            if response.status_code == 200:
                raise NoRangesError
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or not found or int(found[1]) != begin:
                answer = response.headers.get("Content-Range")
                raise CheckpointError(f"{self}: the server was asked for bytes from {begin} on, and sends {answer}")
            check(Version(int(found[3]), _etag(response)))
            left = min(end, int(found[3])) - begin
            for data in response.iter_bytes():
                yield data[:left]
                left -= min(len(data), left)

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit[:12]}: {self.name}"


def can_read_ranges() -> bool:
    """Whether the Hub client that is installed has a session that streams (1.0 has)."""
    from huggingface_hub.utils import get_session

    return callable(getattr(get_session(), "stream", None))


def first_line(error: BaseException) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, _TryAgainError) else f"{type(error).__name__}: {said}"


def _etag(response: Any) -> str | None:
    """The Hub's own, which it sends with the redirect to where the bytes are."""
    first = (*response.history, response)[0]
    etag = first.headers.get("X-Linked-Etag") or first.headers.get("ETag")
    return etag.removeprefix("W/").strip('"') if etag else None


def _is_transient(error: Exception) -> bool:
    """By name, since it depends on the Hub client's version of which library the errors are."""
    return isinstance(error, _TryAgainError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _seconds(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):
        return float(text)  # type: ignore[arg-type]
    return None
