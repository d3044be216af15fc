"""A folder for what the user typed: a local folder, or a Hugging Face Hub id that is downloaded first."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from ..errors import CheckpointError
from .files import SINGLE_NAME, shards_by_name
from .foreign import what_begins, what_they_are
from .reading import exists, open_file

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")  # org/name, or org/name@revision
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--([\w-][\w.-]*)--([\w-][\w.-]*)")  # what the Hub's cache calls the folder of org/name


def local_folder(source: str | os.PathLike[str], files: Sequence[str], index: str | None = None) -> Path:
    """The local folder of `source`, as an absolute path.

    Of a Hub id, `files` are downloaded, and the shards that the file `index` names if there is no model.safetensors;
    nothing else that may lie beside them (original/, consolidated.safetensors). Raises CheckpointError when `source` is
    neither a folder nor a Hub id that can be fetched.
    """
    path = Path(source).expanduser().absolute()
    if exists(path):
        if not path.is_dir():
            raise CheckpointError(f"{source}: expected a folder, found {_kind(path)}")
        return path
    if path.is_symlink():
        raise CheckpointError(f"{source}: a link to {path.readlink()}, which is not there")
    hub_id = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if not hub_id:
        raise CheckpointError(f"{source}: no such folder")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{source}: no such folder; to fetch it from the Hub, pip install huggingface_hub ({error})"
        ) from error
    try:
        folder, others = _fetch(hub_id[1], hub_id[2], files, index)
    except CheckpointError:
        raise
    except Exception as error:  # the Hub's client raises errors of its own and of the libraries that it stands on
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{source}: no such folder, and not fetched from the Hub ({type(error).__name__}: {reason})"
        ) from error
    if others is not None:
        raise CheckpointError(f"{source}: expected {' or '.join(files)} on the Hub, {what_they_are(others)}")
    return folder


def is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None


def public_name(source: str | os.PathLike[str]) -> str:
    """A Hub id, or a folder's own name: for records, which go wherever a prior goes, and no machine's paths with it."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return str(source)
    path = path.resolve()
    cached = _CACHED.fullmatch(path.parent.parent.name)
    return f"{cached[1]}/{cached[2]}@{path.name}" if cached else path.name


def _fetch(
    repository: str, revision: str | None, files: Sequence[str], index: str | None
) -> tuple[Path, list[str] | None]:
    """The local copy; and what the repository holds, if it is nothing of what was asked for."""
    from huggingface_hub import list_repo_files, snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files))).absolute()
    if exists(folder / SINGLE_NAME) or (index is None and all(exists(folder / name) for name in files)):
        return folder, None
    if index is None or not exists(folder / index):
        return folder, list_repo_files(repository, revision=revision)
    if _COMMIT.fullmatch(folder.name):
        revision = folder.name  # the index's own, should the branch move on between
    shards = sorted({escape(shard) for shard in shards_by_name(folder / index).values()})
    return Path(snapshot_download(repository, revision=revision, allow_patterns=shards)).absolute(), None


def _kind(path: Path) -> str:
    with open_file(path) as file:
        return what_begins(file.read(64)) or "a file: give the folder that it is in"
