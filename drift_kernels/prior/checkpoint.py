"""A checkpoint: the tensors and the config of a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .files import INDEX_NAME, SINGLE_NAME, Source, TensorFile, inspect_shards, shards_by_name
from .foreign import what_lies_in
from .reading import OpenFiles, exists, read_json, unreadable
from .scaled import with_scales

logger = logging.getLogger("drift_kernels")

_OPEN_FILES = 16  # per checkpoint; consecutive names are in few shards


class Checkpoint:
    """A local folder of safetensors files, sharded or not, with its config.json.

    If there are both a model.safetensors and an index, the former is read, as in transformers (4.57 and 5). Several
    threads may read at once. Only a few shards are open at a time, until close().

    Raises CheckpointError if the folder does not contain a safetensors checkpoint, or if that is incomplete, damaged or
    unreadable.
    """

    def __init__(self, folder: Path, files: OpenFiles | None = None) -> None:
        self.folder = folder
        self.files = OpenFiles(_OPEN_FILES) if files is None else files
        self.config = read_json(folder / "config.json") if exists(folder / "config.json") else {}
        if self.files.has(folder / SINGLE_NAME):
            tensors = TensorFile.inspect(folder / SINGLE_NAME, self.files).tensors
            if exists(folder / INDEX_NAME) and not _names_only_the_single_file(folder / INDEX_NAME):
                logger.warning(
                    "%s: reading %s, as transformers does, and ignoring %s next to it", folder, SINGLE_NAME, INDEX_NAME
                )
        elif exists(folder / INDEX_NAME):
            tensors = inspect_shards(folder, INDEX_NAME, self.files)
        else:
            raise CheckpointError(f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}, {_content(folder)}")
        self.tensors = with_scales(tensors, self.config)

    def read_into(self, flat: Tensor, tensor: Source, start: int = 0) -> None:
        """Fill `flat` (1-D, contiguous, the tensor's dtype) with the tensor's elements from `start` on."""
        tensor.read_from(self.files, flat, start)

    def read(self, tensor: Source) -> Tensor:
        """Read the whole tensor, as a new one."""
        return tensor.read_flat_from(self.files, 0, tensor.numel).view(tensor.shape)

    def fetch(self, tensors: Iterable[Source]) -> None:
        """Announce the tensors that will be read, so that remote parts of them are fetched now."""
        self.files.fetch(place for tensor in tensors for place in tensor.places())

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _names_only_the_single_file(index: Path) -> bool:
    try:
        return set(shards_by_name(index).values()) == {SINGLE_NAME}
    except CheckpointError:
        return False


def _content(folder: Path) -> str:
    try:
        return what_lies_in(folder)
    except OSError as error:
        return f"but {unreadable(folder, error)}"
