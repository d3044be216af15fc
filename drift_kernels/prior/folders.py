"""Folders that are written under a temporary name, and renamed when they are complete."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import PriorError
from .names import some
from .record import UNFINISHED_MARK
from .writing import sync_folder

logger = logging.getLogger("drift_kernels")


@dataclass(frozen=True)
class NewFolder:
    """A folder to be created at `target`.

    An existing folder is replaced only if `overwrite`, and only if it contains `record`, the file that identifies this
    kind of folder. `kind` is its name in messages.
    """

    target: Path
    record: str
    kind: str
    overwrite: bool

    def check(self) -> None:
        """Raise PriorError if the folder cannot be created. Warn of unfinished folders next to it."""
        self._check_target()
        beside = self.target.parent.glob(f"{self.target.name}{UNFINISHED_MARK}*")
        if leftovers := [path.name for path in beside]:
            logger.warning("found unfinished builds next to %s, which can be deleted: %s", self.target, some(leftovers))

    def check_is_not_of(self, source: Path) -> None:
        """Raise PriorError if the folder would replace `source`, an absolute path that is read."""
        if self.target == source or self.target in source.parents:
            raise PriorError(f"{self.target} would replace {source}, which it is made from")

    @contextmanager
    def that_appears_complete(self) -> Iterator[Path]:
        """Yield a temporary folder, which is renamed to the target when the block ends, or removed if it fails."""
        target = self.target
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f"{target.name}{UNFINISHED_MARK}{secrets.token_hex(4)}")
        old = target.with_name(folder.name + ".old")
        try:
            folder.mkdir()
            yield folder
            sync_folder(folder)
            self._check_target()
            if target.exists():
                target.rename(old)
            folder.rename(target)
            sync_folder(target.parent)
        finally:
            self.clear(folder, old)

    def clear(self, folder: Path, old: Path) -> None:
        """Remove what is left, and restore the old target if it was stopped between the two renames."""
        if old.exists() and not self.target.exists():
            old.rename(self.target)
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_target(self) -> None:
        if self.target.exists() and not self.overwrite:
            raise PriorError(f"{self.target} already exists; pass overwrite=True (--overwrite) to replace it")
        if self.target.exists() and not (self.target / self.record).exists():
            raise PriorError(f"{self.target} exists but is not a {self.kind}, so it is not replaced")
