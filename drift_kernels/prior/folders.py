"""Folders that are written beside their place, and take their name when they are complete."""

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
    """A folder that is to be made at `target`.

    One that is there is replaced only if `overwrite`, and if it holds `record`, the file by which a folder of this kind
    is known; `kind` is what messages call it.
    """

    target: Path
    record: str
    kind: str
    overwrite: bool

    def check(self) -> None:
        """Raises PriorError if something is in the way. Unfinished folders that lie beside are warned of."""
        self._check_target()
        beside = self.target.parent.glob(f"{self.target.name}{UNFINISHED_MARK}*")
        if leftovers := [path.name for path in beside]:
            logger.warning("unfinished builds lie beside %s and may be deleted: %s", self.target, some(leftovers))

    def check_is_not_of(self, source: Path) -> None:
        """Raises PriorError if the folder would take the place of `source`, an absolute path that is read."""
        if self.target == source or self.target in source.parents:
            raise PriorError(f"{self.target} would take the place of {source}, which it is made of")

    @contextmanager
    def that_appears_complete(self) -> Iterator[Path]:
        """A folder beside the target that takes its name when the block ends, and is removed when the block fails."""
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
            if old.exists() and not target.exists():  # interrupted between the two renames
                old.rename(target)
            for leftover in (folder, old):
                shutil.rmtree(leftover, ignore_errors=True)

    def _check_target(self) -> None:
        if self.target.exists() and not self.overwrite:
            raise PriorError(f"{self.target} exists already; overwrite=True (--overwrite) replaces it")
        if self.target.exists() and not (self.target / self.record).exists():
            raise PriorError(f"{self.target} exists and is not a {self.kind}, so it is not replaced")
