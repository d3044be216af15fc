"""Building a prior: checkpoints are streamed, piece by piece, into a folder that appears when complete."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, PriorError
from ..formats.blocks import DELTA_LIMITS, blocks_of
from .alignment import align_checkpoints
from .deltas import DTYPES, FORMAT, PRIOR_INDEX_NAME, RECORD_NAME, VERSION
from .files import Checkpoint, Layout, TensorFileWriter, size_in_bytes
from .hub import local_folder
from .names import some
from .pairing import Pair, pair_up
from .prior import UNFINISHED_MARK, Prior
from .quantized import scales_name
from .stream import DeltaStream

logger = logging.getLogger("drift_kernels")

Progress = Callable[[int, int], None]
"""Called with the elements done so far and the elements in all."""


def build_prior(
    expert: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    modules: Sequence[str] = ("attn", "mlp"),
    layers: Iterable[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    name_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Prior:
    """Build the prior `expert - base` (or `expert - reference`) and write it to the folder `out`.

    `expert`, `base` and `reference` are folders of safetensors checkpoints, or Hub ids. Tensors pair up by canonical
    name; `modules` are entries of "attn", "mlp", "norm", "embed", "head", or "re:REGEX" over canonical names; `layers`
    are the base's layer numbers (default: all). Deltas are computed in float32 and stored as `dtype`: float32,
    bfloat16, or int8 or float8_e4m3fn with a float32 scale for every 128 elements (quantized.py). `name_map` (prefix ->
    canonical prefix) adds families that the name table does not know; for those in neither it is found by names and
    shapes. It is recorded in the prior. Memory stays flat whatever the checkpoints' size.

    The folder appears under its name when it is complete; an existing prior is replaced only if `overwrite`. Raises
    CheckpointError for damaged, incomplete or foreign checkpoints, PriorError for checkpoints that do not fit each
    other, a NaN or Inf, and an `out` in the way; ValueError for an unknown module or dtype.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
    target = Path(out).expanduser().absolute()
    _check_target(target, overwrite)
    if leftovers := [path.name for path in target.parent.glob(f"{target.name}{UNFINISHED_MARK}*")]:
        logger.warning("unfinished builds lie beside %s and may be deleted: %s", target, some(leftovers))
    chosen = {"expert": expert, "base": base} | ({} if reference is None else {"reference": reference})
    layers = None if layers is None else sorted(set(layers))
    with ExitStack() as stack:
        checkpoints = {role: stack.enter_context(open_checkpoint(source)) for role, source in chosen.items()}
        name_map, notes = align_checkpoints(checkpoints, name_map)
        pairs, warnings = pair_up(checkpoints, modules, layers, name_map)
        warnings = notes + warnings
        _check_names(pairs, dtype)
        for warning in warnings:
            logger.warning("%s", warning)
        with _folder_that_appears_complete(target, overwrite) as folder:
            stream = DeltaStream(checkpoints, dtype)
            with _one_thread():
                _write_shards(folder, _plan_shards(pairs, dtype, max_shard_bytes), stream, dtype, progress)
            record = {
                "format": FORMAT,
                "version": VERSION,
                "delta": f"expert - {'base' if reference is None else 'reference'}",
                "dtype": str(dtype).removeprefix("torch."),
                "modules": list(modules),
                "layers": layers,
                "name_map": name_map,
                "warnings": warnings,
                "sources": {
                    role: {"name": _public_name(source), "sha256": stream.digests[role].hexdigest()}
                    for role, source in chosen.items()
                },
                "tensors": {pair.name: {"shape": list(pair.shape), **stream.measure(pair)} for pair in pairs},
            }
            _write_json(folder / RECORD_NAME, record)
    return Prior.open(target)


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """The safetensors checkpoint of a local folder or a Hub id. Raises CheckpointError."""
    try:
        return Checkpoint(local_folder(source, ("*.safetensors", "*.safetensors.index.json", "config.json")))
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise PriorError(f"{target} exists already; overwrite=True (--overwrite) replaces it")
    if target.exists() and not (target / RECORD_NAME).exists():
        raise PriorError(f"{target} exists and is not a prior, so it is not replaced")


def _check_names(pairs: Iterable[Pair], dtype: torch.dtype) -> None:
    names = {pair.name for pair in pairs}
    for name in names if dtype in DELTA_LIMITS else ():
        if scales_name(name) in names:
            raise PriorError(f"{scales_name(name)} is a tensor of the checkpoints, and where the scales of {name} go")


@contextmanager
def _folder_that_appears_complete(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends, and is removed when the block fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f"{target.name}{UNFINISHED_MARK}{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
        _sync_folder(folder)
        _check_target(target, overwrite)
        old = target.with_name(folder.name + ".old")
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for each of torch's operations: the stream runs several pieces side by side, and the barriers of many
    short parallel operations would cost several times the work itself on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _plan_shards(pairs: Iterable[Pair], dtype: torch.dtype, max_bytes: int) -> list[list[Pair]]:
    """Consecutive pairs, up to `max_bytes` a shard; a larger tensor has a shard for itself."""
    shards: list[list[Pair]] = []
    room = 0
    for pair in pairs:
        size = sum(map(size_in_bytes, _layout([pair], dtype).values()))
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(pair)
        room -= size
    return shards


def _layout(shard: Sequence[Pair], dtype: torch.dtype) -> Layout:
    """What is stored of the deltas of a shard: scales, if there are any, come first and so lie aligned."""
    deltas = {pair.name: (dtype, pair.shape) for pair in shard}
    if dtype not in DELTA_LIMITS:
        return deltas
    return {scales_name(pair.name): (torch.float32, (blocks_of(pair.numel),)) for pair in shard} | deltas


def _write_shards(
    folder: Path, shards: list[list[Pair]], stream: DeltaStream, dtype: torch.dtype, progress: Progress | None
) -> None:
    """The shards and their index; each shard is brought to the disk while the next is made."""
    total, done = sum(pair.numel for shard in shards for pair in shard), 0
    total_size, weight_map = 0, {}
    with ExitStack() as files, ThreadPoolExecutor(max_workers=1) as disk:
        synced = []
        for number, shard in enumerate(shards, 1):
            name = f"prior-{number:05d}-of-{len(shards):05d}.safetensors"
            layout = _layout(shard, dtype)
            writer = files.enter_context(TensorFileWriter(folder / name, layout))
            for piece, stored in stream.deltas(shard):
                for tensor, flat in stored.items():
                    writer.append(tensor, flat)
                done += piece.count
                if progress is not None:
                    progress(done, total)
            synced.append(disk.submit(writer.sync))
            total_size += sum(map(size_in_bytes, layout.values()))
            weight_map.update(dict.fromkeys(layout, name))
        for future in synced:
            future.result()
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(folder / PRIOR_INDEX_NAME, index)


def _public_name(source: str | os.PathLike[str]) -> str:
    """A Hub id, or a folder's own name: the record goes wherever the prior goes, and no machine's paths with it."""
    return str(source) if not Path(source).is_dir() else Path(source).resolve().name


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
