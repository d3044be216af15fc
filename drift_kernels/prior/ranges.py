"""Reading byte ranges of files on the Hub, through the Hub client's session with its token, proxies and endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

from ..errors import CheckpointError

_RETRIES = 5  # consecutive ones, without receiving a byte in between
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds; waits double each time; the longest also caps a server's Retry-After
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Version(NamedTuple):
    """The version of a file, which must not change between requests."""

    size: int
    etag: str | None


class NoRangesError(Exception):
    """Raised if the server only sends whole files."""


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
        """Yield the bytes from `begin` to `end`, or to the end of the file, in pieces, until `stopping` is set. Calls
        `check` with the file's version before the first byte of each response.

        Transient failures are retried from the first missing byte. Raises NoRangesError, CheckpointError for lasting
        failures, and the errors of `check`.
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
                    raise _TryAgainError(f"the response ended {end - begin} bytes too early")
            except Exception as error:
                if not _is_transient(error):
                    raise
                failures += 1
                if failures > _RETRIES:
                    raise CheckpointError(
                        f"{self}: cannot be fetched from the Hub, after {_RETRIES} retries ({first_line(error)}); what "
                        "has arrived is kept, and the next build resumes from there"
                    ) from error
                wait = getattr(error, "wait", None) or _FIRST_WAIT * 2 ** (failures - 1)
                stopping.wait(min(wait, _LONGEST_WAIT))

    def _responded(self, begin: int, end: int, check: Callable[[Version], None]) -> Iterator[bytes]:
        """Yield the bytes of one request."""
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
                raise CheckpointError(f"{self}: requested bytes from {begin} on, but the server sends {answer}")
            check(Version(int(found[3]), _etag(response)))
            left = min(end, int(found[3])) - begin
            for data in response.iter_bytes():
                yield data[:left]
                left -= min(len(data), left)

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit[:12]}: {self.name}"


def can_read_ranges() -> bool:
    """Whether the installed Hub client supports streaming (1.0 and newer)."""
    from huggingface_hub.utils import get_session

    return callable(getattr(get_session(), "stream", None))


def first_line(error: BaseException) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, _TryAgainError) else f"{type(error).__name__}: {said}"


def _etag(response: Any) -> str | None:
    """The Hub's ETag, which it sends with the redirect to the location of the bytes."""
    first = (*response.history, response)[0]
    etag = first.headers.get("X-Linked-Etag") or first.headers.get("ETag")
    return etag.removeprefix("W/").strip('"') if etag else None


def _is_transient(error: Exception) -> bool:
    """Whether to retry. Checked by name, because the library that errors come from depends on the Hub client."""
    return isinstance(error, _TryAgainError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _seconds(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):
        return float(text)  # type: ignore[arg-type]
    return None
