"""A loopback server that answers like the Hub: repositories in folders, large files by redirect to another server."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Asked(NamedTuple):
    """A request for a file's bytes, with its range; None for the whole file."""

    repository: str
    revision: str
    file: str
    range: tuple[int, int] | None


class LoopbackHub:
    """`folder` holds repositories as `org/name`; every revision is COMMIT.

    `faults` are the faults of the next requests for bytes of .safetensors files, one per request: "500", "429" and
    "503" (statuses), "drop" (no answer), "short" (half of the bytes), "silent" (half, declared as all), "empty",
    "changed" (another ETag), "longer" (another size), "elsewhere" (another range), "404" and "fine".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[Asked] = []
        self.headers: list[dict[str, str]] = []
        self.revisions: list[tuple[str, str]] = []
        self.faults: deque[str] = deque()
        self.ranges = True
        self.lock = Lock()
        self.endpoint, self.elsewhere = "", ""  # the second serves the bytes of large files
        folder.mkdir(parents=True, exist_ok=True)

    def bytes_asked(self, repository: str) -> int:
        return sum(a.range[1] - a.range[0] for a in self.asked if a.repository == repository and a.range)

    def fetched(self, repository: str) -> set[str]:
        """The files that were requested, entirely or in part."""
        return {asked.file for asked in self.asked if asked.repository == repository}

    def in_parts(self, repository: str) -> set[str]:
        return {asked.file for asked in self.asked if asked.repository == repository and asked.range}

    @contextmanager
    def serving(self) -> Iterator[LoopbackHub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        self.elsewhere = f"http://localhost:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._api(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/bytes/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self._bytes(match[1], match[2], match[3])
        else:
            self._send(404, b"")

    def _api(self, repository: str, what: str | None, revision: str) -> None:
        root = self.hub.folder / repository
        if not root.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in root.rglob("*") if path.is_file())
        names = [str(path.relative_to(root)) for path in files]
        with self.hub.lock:
            self.hub.revisions.append((repository, revision))
        if what == "tree":
            content: Any = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
        else:
            content = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        """Redirect large files to the other server, with headers that describe them."""
        path = self.hub.folder / repository / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        large = path.suffix == ".safetensors"
        if large and self.command == "GET" and self.hub.faults and self.hub.faults[0] in ("404", "changed"):
            with self.hub.lock:
                fault = self.hub.faults.popleft()
        else:
            fault = None
        if fault == "404":
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        etag = "of-another-file" if fault == "changed" else _etag(path)
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(path.stat().st_size)}
        if large:
            headers["Location"] = f"{self.hub.elsewhere}/bytes/{repository}/{revision}/{name}"
            self._send(302, b"", headers)
            return
        if self.command == "GET":
            self._note(repository, revision, name, None)
        self._send(200, path.read_bytes(), headers | {"ETag": f'"{etag}"'})

    def _bytes(self, repository: str, revision: str, name: str) -> None:
        content = (self.hub.folder / repository / name).read_bytes()
        if self.command == "HEAD":
            self._send(200, content)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = (int(match[1]), min(int(match[2]) + 1, len(content))) if match else None
        self._note(repository, revision, name, asked)
        with self.hub.lock:
            fault = self.hub.faults.popleft() if self.hub.faults else "fine"
        if fault.isdigit():
            self._send(int(fault), b"busy", {"Retry-After": "0"})
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif asked is None or not self.hub.ranges:
            self._send(200, content, {"ETag": '"elsewhere"'})
        else:
            begin, end = asked
            size = len(content) + (fault == "longer")
            shift = 1 if fault == "elsewhere" else 0
            headers = {"Content-Range": f"bytes {begin + shift}-{end - 1}/{size}", "ETag": '"elsewhere"'}
            self._send(206, content[begin:end], headers, cut=fault if fault in ("short", "silent", "empty") else None)

    def _note(self, repository: str, revision: str, name: str, asked: tuple[int, int] | None) -> None:
        with self.hub.lock:
            self.hub.asked.append(Asked(repository, revision, name, asked))
            self.hub.headers.append({key.lower(): value for key, value in self.headers.items()})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: str | None = None) -> None:
        sent = b"" if cut == "empty" else body[: len(body) // 2] if cut else body
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body if cut == "short" else sent)))
        self.end_headers()
        if self.command == "GET":
            try:
                self.wfile.write(sent)
            except OSError:  # the client has closed the connection: it did not want the whole file
                self.close_connection = True
        if cut:
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
