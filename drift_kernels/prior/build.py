"""Building a prior: checkpoints are streamed, piece by piece, into a folder that appears when complete."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from ..errors import PriorError
from ..formats.blocks import DELTA_LIMITS, blocks_of
from .alignment import align_checkpoints
from .files import Layout, size_in_bytes
from .names import some
from .opening import name_for_the_record, open_checkpoint
from .pairing import Pair, Selection, pair_up
from .plausible import check_values
from .prior import Prior
from .quantized import scales_name
from .record import (
    DTYPES,
    FORMAT,
    PRIOR_INDEX_NAME,
    RECORD_NAME,
    UNFINISHED_MARK,
    VERSION,
    DeltaInfo,
    checksum_fields,
)
from .stream import DeltaStream
from .writing import TensorFileWriter, sync_folder, write_json

logger = logging.getLogger("drift_kernels")

Progress = Callable[[int, int], None]
"""Called with the elements done so far and the elements in all."""

_WRITERS = 3  # shards that are open at a time: one is written, two may wait for the disk


def build_prior(
    expert: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    modules: Sequence[str] = ("attn", "mlp"),
    layers: Iterable[int] | None = None,
    include_bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    name_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Prior:
    """Build the prior `expert - base` (or `expert - reference`) and write it to the folder `out`.

    `expert`, `base` and `reference` are folders of safetensors checkpoints; Hub ids, `org/name` or `org/name@revision`,
    of which only what is needed is fetched; or `BASE+ADAPTER`, two of these, where the second is a PEFT LoRA adapter,
    merged while it is read, in float32. FP8 codes with scales are read as float32 too. Tensors pair up by canonical
    name; `modules` are entries of names.PRESETS, as "attn", "mlp", "full", or "re:REGEX" over canonical names; `layers`
    are the base's layer numbers (default: all). Biases come with their weights unless `include_bias` is False; one that
    the expert does not have, and so is zero in it, is pulled to zero. Deltas are computed in float32 and stored as
    `dtype`: float32, bfloat16, or int8 or float8_e4m3fn with a float32 scale for every 128 elements (quantized.py).
    `name_map` (prefix -> canonical prefix) adds families that the name table does not know; for those in neither it is
    found by names and shapes. It is recorded in the prior. Memory stays flat whatever the checkpoints' size.

    The folder appears under its name when it is complete; an existing prior is replaced only if `overwrite`. Raises
    CheckpointError for damaged, incomplete, foreign, unreadable or otherwise quantised checkpoints, other adapters,
    PriorError for checkpoints that do not fit each other or do not differ, a NaN or Inf, and an `out` in the way;
    ValueError for an unknown module or dtype; OSError when `out` cannot be written.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
    target = Path(out).expanduser().resolve()  # of a link, what it stands for
    _check_target(target, overwrite)
    if leftovers := [path.name for path in target.parent.glob(f"{target.name}{UNFINISHED_MARK}*")]:
        logger.warning("unfinished builds lie beside %s and may be deleted: %s", target, some(leftovers))
    chosen = {"expert": expert, "base": base} | ({} if reference is None else {"reference": reference})
    layers = None if layers is None else sorted(set(layers))
    with ExitStack() as stack:
        checkpoints = {role: stack.enter_context(open_checkpoint(source)) for role, source in chosen.items()}
        name_map, notes = align_checkpoints(checkpoints, name_map)
        pairs, warnings = pair_up(checkpoints, Selection(modules, layers, include_bias), name_map)
        warnings = notes + warnings
        _check_names(pairs, dtype)
        for warning in warnings:
            logger.warning("%s", warning)
        for role, checkpoint in checkpoints.items():
            checkpoint.fetch(pair.sources[role] for pair in pairs if role in pair.sources)
        with _folder_that_appears_complete(target, overwrite) as folder:
            stream = DeltaStream(checkpoints, dtype)
            with _one_thread():
                shards = _plan_shards(pairs, dtype, max_shard_bytes)
                checksums = _write_shards(folder, shards, stream, dtype, progress)
            rows = {pair.name: stream.measure(pair) for pair in pairs}
            found = check_values({pair.name: DeltaInfo(pair.shape, dtype, **rows[pair.name]) for pair in pairs})
            for warning in found:
                logger.warning("%s", warning)
            record = {
                "format": FORMAT,
                "version": VERSION,
                "delta": f"expert - {'base' if reference is None else 'reference'}",
                "dtype": str(dtype).removeprefix("torch."),
                "modules": list(modules),
                "layers": layers,
                "name_map": name_map,
                "include_bias": include_bias,
                "pulled_to_zero": [pair.name for pair in pairs if pair.pulled_to_zero],
                "warnings": warnings + found,
                "sources": {
                    role: {"name": name_for_the_record(source), "sha256": stream.digests[role].hexdigest()}
                    for role, source in chosen.items()
                },
                "tensors": {
                    pair.name: {
                        "shape": list(pair.shape),
                        **rows[pair.name],
                        **checksum_fields(pair.name, checksums),
                    }
                    for pair in pairs
                },
            }
            write_json(folder / RECORD_NAME, record)
    return Prior.open(target)


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
    old = target.with_name(folder.name + ".old")
    try:
        folder.mkdir()
        yield folder
        sync_folder(folder)
        _check_target(target, overwrite)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        sync_folder(target.parent)
    finally:
        if old.exists() and not target.exists():  # interrupted between the two renames
            old.rename(target)
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)


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
) -> dict[str, int]:
    """The shards and their index; each shard is brought to the disk while the next is made. Returns the checksums of
    the tensors in them."""
    total, done = sum(pair.numel for shard in shards for pair in shard), 0
    total_size, weight_map, checksums = 0, {}, {}
    with ExitStack() as files, ThreadPoolExecutor(max_workers=1) as disk:
        synced = []
        for number, shard in enumerate(shards, 1):
            name = f"prior-{number:05d}-of-{len(shards):05d}.safetensors"
            layout = _layout(shard, dtype)
            writer = files.enter_context(TensorFileWriter(folder / name, layout))
            with closing(stream.deltas(shard)) as deltas:  # its threads end before the files do, whatever happens
                for piece, stored in deltas:
                    for tensor, flat in stored.items():
                        writer.append(tensor, flat)
                    done += piece.count
                    if progress is not None:
                        progress(done, total)
            checksums.update(writer.checksums)
            synced.append(disk.submit(writer.finish))
            if len(synced) >= _WRITERS:
                synced[-_WRITERS].result()
            total_size += sum(map(size_in_bytes, layout.values()))
            weight_map.update(dict.fromkeys(layout, name))
        for future in synced:
            future.result()
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / PRIOR_INDEX_NAME, index)
    return checksums
