"""Completed runs, one file each; they are not repeated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .settings import Run, Settings

Cell = dict[str, Any]  # one run: its record, its seconds, and where it was made


class Cells:
    """The results under a folder, all with the same settings.

    Raises:
        ValueError: if the folder has results with other settings.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self.folder = root / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        found, mine = self.folder / "settings", json.dumps(asdict(settings), indent=1) + "\n"
        if found.exists() and found.read_text() != mine:
            raise ValueError(f"the results under {root} have other settings than expected: use another --out")
        if not found.exists():
            _write(found, mine)

    def get(self, run: Run) -> Cell | None:
        path = self._path(run)
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, run: Run, cell: Mapping[str, Any]) -> None:
        _write(self._path(run), json.dumps({"run": asdict(run), **cell}) + "\n")

    def _path(self, run: Run) -> Path:
        key = json.dumps(asdict(run), sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def _write(path: Path, text: str) -> None:
    """Write the file completely or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
