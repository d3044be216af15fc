"""Local folders for what a user names: a folder, or a Hugging Face Hub id that is downloaded or read in parts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ..errors import CheckpointError
from .files import INDEX_NAME, SINGLE_NAME, shards_by_name
from .foreign import what_begins, what_they_are
from .partial import PartialFiles
from .ranges import NoRangesError, RemoteFile, can_read_ranges
from .reading import OpenFiles, exists, open_file

logger = logging.getLogger("drift_kernels")

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")  # org/name, or org/name@revision
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--([\w-][\w.-]*)--([\w-][\w.-]*)")  # the folder of org/name in the Hub's cache


def local_folder(source: str | os.PathLike[str], files: Sequence[str], index: str | None = None) -> Path:
    """Return the local folder of `source`, as an absolute path.

    For a Hub id, downloads `files` (names or patterns), and the shards listed in the file `index` if there is no
    model.safetensors, but no other files next to them (original/, consolidated.safetensors). Raises CheckpointError if
    `source` is neither a folder nor a Hub id that can be fetched.
    """
    if isinstance(found := _find(source), Path):
        return found
    with _fetching(source):
        folder, others = _download(*found, files, index)
    if others is not None:
        expected = " or ".join(file for file in files if "*" not in file)
        raise CheckpointError(f"{source}: expected {expected} on the Hub, {what_they_are(others)}")
    return folder


def checkpoint_folder(source: str | os.PathLike[str], config: str) -> tuple[Path, OpenFiles | None]:
    """Return the folder of a checkpoint, and the reader of its files, if not all of them are local.

    For a Hub id that is not in the Hub's cache, downloads the file `config`, the index, and the headers of the other
    files; the rest is fetched when it is needed. If the server, or a Hub client older than 1.0, does not support this,
    downloads whole files. Raises CheckpointError like `local_folder`.
    """
    if isinstance(found := _find(source), Path):
        return found, None
    if can_read_ranges():
        try:
            with _fetching(source, NoRangesError):
                return _open_partly(source, *found, config)
        except NoRangesError:
            logger.warning("%s: downloading whole files, because the server does not send parts of files", source)
    return local_folder(source, (SINGLE_NAME, INDEX_NAME, config), INDEX_NAME), None


def is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None


def public_name(source: str | os.PathLike[str]) -> str:
    """The Hub id or the base name of a folder, for records, which are published with a prior and must not contain
    local paths."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return str(source)
    path = path.resolve()
    cached = _CACHED.fullmatch(path.parent.parent.name)
    return f"{cached[1]}/{cached[2]}@{path.name}" if cached else path.name


def _find(source: str | os.PathLike[str]) -> Path | tuple[str, str | None]:
    """Find a local folder, or else a repository and a revision."""
    path = Path(source).expanduser().absolute()
    if exists(path):
        if not path.is_dir():
            raise CheckpointError(f"{source}: expected a folder, found {_kind(path)}")
        return path
    if path.is_symlink():
        raise CheckpointError(f"{source}: a link to {path.readlink()}, which does not exist")
    hub_id = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if not hub_id:
        raise CheckpointError(f"{source}: no such folder")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{source}: no such folder; to fetch it from the Hub, run pip install 'drift_kernels[hub]' ({error})"
        ) from error
    return hub_id[1], hub_id[2]


@contextmanager
def _fetching(source: str | os.PathLike[str], *known: type[Exception]) -> Iterator[None]:
    """Convert the errors of the Hub's client, and of the libraries that it uses, to CheckpointError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (CheckpointError, *known)):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{source}: no such folder, and cannot be fetched from the Hub ({type(error).__name__}: {reason})"
        ) from error


def _download(
    repository: str, revision: str | None, files: Sequence[str], index: str | None
) -> tuple[Path, list[str] | None]:
    """Return the local copy; and the files in the repository, if it has none of those requested."""
    from huggingface_hub import HfApi, snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files))).absolute()
    if exists(folder / SINGLE_NAME) or (index is None and all(exists(folder / name) for name in files)):
        return folder, None
    if index is None or not exists(folder / index):
        return folder, HfApi().list_repo_files(repository, revision=revision)
    if _COMMIT.fullmatch(folder.name):
        revision = folder.name  # the commit of the index, in case the branch moves meanwhile
    shards = sorted({escape(shard) for shard in shards_by_name(folder / index).values()})
    return Path(snapshot_download(repository, revision=revision, allow_patterns=shards)).absolute(), None


def _open_partly(
    source: str | os.PathLike[str], repository: str, revision: str | None, config: str
) -> tuple[Path, OpenFiles | None]:
    """Open the files of one commit: those in the Hub's cache directly, the others in parts."""
    from huggingface_hub import HfApi, cached_assets_path, snapshot_download

    small = [config, INDEX_NAME]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=small)).absolute()
    if exists(folder / SINGLE_NAME):
        return folder, None
    parts, indexed = cached_assets_path("drift_kernels", repository, folder.name), exists(folder / INDEX_NAME)
    try:
        names = HfApi().list_repo_files(repository, revision=folder.name)
    except Exception:  # without a network, the local files may be enough
        if not indexed and not exists(parts / SINGLE_NAME):
            raise
        names = [INDEX_NAME if indexed else SINGLE_NAME]
    if SINGLE_NAME not in names and not indexed:
        raise CheckpointError(f"{source}: expected {SINGLE_NAME} or {INDEX_NAME} on the Hub, {what_they_are(names)}")
    shards = {SINGLE_NAME} if SINGLE_NAME in names else set(shards_by_name(folder / INDEX_NAME).values())
    missing = {folder / name: RemoteFile(repository, folder.name, name) for name in sorted(shards)}
    missing = {path: file for path, file in missing.items() if not exists(path)}
    return folder, PartialFiles(missing, parts) if missing else None


def _kind(path: Path) -> str:
    with open_file(path) as file:
        return what_begins(file.read(64)) or "a file: pass its folder"
