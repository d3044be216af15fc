"""A checkpoint: the tensors of a folder, and its config."""

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

_OPEN_FILES = 16  # of a checkpoint; names in order are in few shards at a time


class Checkpoint:
    """A local folder of safetensors files, sharded or not, with its config.json.

    Of model.safetensors and an index it reads the first, as transformers does (4.57 and 5).
    Several threads may read at once; few shards are open at a time, and those until close().

    Raises CheckpointError when the folder holds no safetensors checkpoint, or one that is incomplete, damaged, or
    cannot be read.
    """

    def __init__(self, folder: Path, files: OpenFiles | None = None) -> None:
        self.folder = folder
        self.files = OpenFiles(_OPEN_FILES) if files is None else files
        self.config = read_json(folder / "config.json") if exists(folder / "config.json") else {}
        if self.files.has(folder / SINGLE_NAME):
            tensors = TensorFile.inspect(folder / SINGLE_NAME, self.files).tensors
            if exists(folder / INDEX_NAME) and not _names_only_the_single_file(folder / INDEX_NAME):
                logger.warning(
                    "%s: %s is read, as transformers does, and %s beside it is not", folder, SINGLE_NAME, INDEX_NAME
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
        """The whole tensor, in memory of its own."""
        return tensor.read_flat_from(self.files, 0, tensor.numel).view(tensor.shape)

    def fetch(self, tensors: Iterable[Source]) -> None:
        """Say which tensors will be read, before they are: what lies elsewhere is fetched now."""
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
