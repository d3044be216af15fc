"""Building a prior: checkpoints are streamed, piece by piece, into a folder that appears when complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from ..errors import PriorError
from .alignment import align_checkpoints
from .files import INDEX_NAME, SINGLE_NAME, Checkpoint, size_in_bytes
from .folders import NewFolder
from .forms import Form, FormedDeltas, Shapes
from .hub import local_folder, public_name
from .pairing import Pair, Selection, pair_up
from .plausible import check_values
from .prior import Prior
from .record import (
    DTYPES,
    FORMAT,
    PRIOR_INDEX_NAME,
    RECORD_NAME,
    DeltaInfo,
    checksum_fields,
    version_of,
)
from .stream import DeltaStream
from .threads import one_thread
from .writing import TensorFileWriter, write_json

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
    rank: int | None = None,
    name_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Prior:
    """Build the prior `expert - base` (or `expert - reference`) and write it to the folder `out`.

    `expert`, `base` and `reference` are folders of safetensors checkpoints, or Hub ids. Tensors pair up by canonical
    name; `modules` are entries of names.PRESETS, as "attn", "mlp", "full", or "re:REGEX" over canonical names; `layers`
    are the base's layer numbers (default: all). Biases come with their weights unless `include_bias` is False; one that
    the expert does not have, and so is zero in it, is pulled to zero. Deltas are computed in float32 and stored as
    `dtype`: float32, bfloat16, or int8 or float8_e4m3fn with a float32 scale for every 128 elements (quantized.py).
    With a `rank`, matrices are stored as two bfloat16 factors of it (low_rank.py), where these are the smaller ones: as
    near to the delta as the rank allows, by a randomised iteration that gives the same bits each time.
    `name_map` (prefix -> canonical prefix) adds families that the name table does not know; for those in neither it is
    found by names and shapes. It is recorded in the prior. Memory stays flat whatever the checkpoints' size.

    The folder appears under its name when it is complete; an existing prior is replaced only if `overwrite`. Raises
    CheckpointError for damaged, incomplete, foreign, unreadable or quantised checkpoints and unmerged adapters,
    PriorError for checkpoints that do not fit each other or do not differ, a NaN or Inf, and an `out` in the way;
    ValueError for an unknown module or dtype and a rank below 1; OSError when `out` cannot be written.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number from 1 on, got {rank!r}")
    form = Form(dtype, rank)
    target = Path(out).expanduser().resolve()  # of a link, what it stands for
    new = NewFolder(target, RECORD_NAME, "prior", overwrite)
    new.check()
    chosen = {"expert": expert, "base": base} | ({} if reference is None else {"reference": reference})
    layers = None if layers is None else sorted(set(layers))
    with ExitStack() as stack:
        checkpoints = {role: stack.enter_context(open_checkpoint(source)) for role, source in chosen.items()}
        name_map, notes = align_checkpoints(checkpoints, name_map)
        pairs, warnings = pair_up(checkpoints, Selection(modules, layers, include_bias), name_map)
        warnings = notes + warnings + form.warnings({pair.name: pair.shape for pair in pairs})
        shapes = {pair.name: pair.shape for pair in pairs}
        _check_names(shapes, form)
        for warning in warnings:
            logger.warning("%s", warning)
        with new.that_appears_complete() as folder:
            stream = DeltaStream(checkpoints, dtype)
            formed = FormedDeltas(stream, form)
            with one_thread():
                shards = _plan_shards(pairs, form, max_shard_bytes)
                checksums = _write_shards(folder, shards, formed, form, progress)
            rows = {pair.name: formed.measure(pair) for pair in pairs}
            infos = {pair.name: DeltaInfo(pair.shape, form.dtype_of(pair.shape), **rows[pair.name]) for pair in pairs}
            found = check_values(infos)
            for warning in found:
                logger.warning("%s", warning)
            record = {
                "format": FORMAT,
                "version": version_of(rows),
                "delta": f"expert - {'base' if reference is None else 'reference'}",
                "dtype": str(dtype).removeprefix("torch."),
                "modules": list(modules),
                "layers": layers,
                "name_map": name_map,
                "include_bias": include_bias,
                "pulled_to_zero": [pair.name for pair in pairs if pair.pulled_to_zero],
                "warnings": warnings + found,
                "sources": {
                    role: {"name": public_name(source), "sha256": stream.digests[role].hexdigest()}
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


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """The safetensors checkpoint of a local folder or a Hub id. Raises CheckpointError."""
    return Checkpoint(local_folder(source, (SINGLE_NAME, INDEX_NAME, "config.json"), INDEX_NAME))


def _check_names(shapes: Shapes, form: Form) -> None:
    for name, shape in shapes.items():
        for tensor in form.layout({name: shape}):
            if tensor != name and tensor in shapes:
                part = tensor.rpartition(".")[2]
                raise PriorError(f"{tensor} is a tensor of the checkpoints, and where the {part} of {name} go")


def _plan_shards(pairs: Iterable[Pair], form: Form, max_bytes: int) -> list[list[Pair]]:
    """Consecutive pairs, up to `max_bytes` a shard; a larger tensor has a shard for itself."""
    shards: list[list[Pair]] = []
    room = 0
    for pair in pairs:
        size = sum(map(size_in_bytes, form.layout({pair.name: pair.shape}).values()))
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(pair)
        room -= size
    return shards


def _write_shards(
    folder: Path, shards: list[list[Pair]], formed: FormedDeltas, form: Form, progress: Progress | None
) -> dict[str, int]:
    """The shards and their index; each shard is brought to the disk while the next is made. Returns the checksums of
    the tensors in them."""
    total, done = sum(pair.numel for shard in shards for pair in shard), 0
    total_size, weight_map, checksums = 0, {}, {}
    with ExitStack() as files, ThreadPoolExecutor(max_workers=1) as disk:
        synced = []
        for number, shard in enumerate(shards, 1):
            name = f"prior-{number:05d}-of-{len(shards):05d}.safetensors"
            layout = form.layout({pair.name: pair.shape for pair in shard})
            writer = files.enter_context(TensorFileWriter(folder / name, layout))
            with closing(formed.deltas(shard)) as deltas:  # its threads end before the files do, whatever happens
                for count, stored in deltas:
                    for tensor, flat in stored.items():
                        writer.append(tensor, flat)
                    done += count
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
