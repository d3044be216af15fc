"""The files that deltas are stored in: what lies in which, and writing them piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import PriorError
from ..formats.blocks import DELTA_LIMITS, blocks_of
from .files import Layout, size_in_bytes
from .quantized import scales_name
from .record import PRIOR_INDEX_NAME
from .writing import TensorFileWriter, write_json

Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[int, int], None]
"""Called with the elements done so far and the elements in all."""


class Piece(Protocol):
    @property
    def count(self) -> int:
        """The elements of a delta in it."""


Pieces = Callable[[Sequence[str]], Generator[tuple[Piece, dict[str, Tensor]], None, None]]
"""The deltas of these names, end to end, in pieces: what to append, 1-D, to which tensors of the prior's files. A piece
is valid until the next is asked for."""

_WRITERS = 3  # shards that are open at a time: one is written, two may wait for the disk


def check_names(shapes: Shapes, dtype: torch.dtype) -> None:
    """Raises PriorError if a delta has the name of another's scales."""
    for name in shapes if dtype in DELTA_LIMITS else ():
        if scales_name(name) in shapes:
            raise PriorError(f"{scales_name(name)} is a tensor of the checkpoints, and where the scales of {name} go")


def write_deltas(
    folder: Path, shapes: Shapes, dtype: torch.dtype, max_bytes: int, pieces: Pieces, progress: Progress | None
) -> dict[str, int]:
    """Deltas of these shapes in shards of up to `max_bytes`, and their index; each shard is brought to the disk while
    the next is made. Returns the checksums of the tensors in them."""
    shards = _plan_shards(shapes, dtype, max_bytes)
    total, done = sum(map(math.prod, shapes.values())), 0
    total_size, weight_map, checksums = 0, {}, {}
    with ExitStack() as files, ThreadPoolExecutor(max_workers=1) as disk:
        synced = []
        for number, shard in enumerate(shards, 1):
            name = f"prior-{number:05d}-of-{len(shards):05d}.safetensors"
            layout = _layout({delta: shapes[delta] for delta in shard}, dtype)
            writer = files.enter_context(TensorFileWriter(folder / name, layout))
            with closing(pieces(shard)) as deltas:  # its threads end before the files do, whatever happens
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


def _plan_shards(shapes: Shapes, dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Consecutive deltas, up to `max_bytes` a shard; a larger one has a shard for itself."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = sum(map(size_in_bytes, _layout({name: shape}, dtype).values()))
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _layout(shapes: Shapes, dtype: torch.dtype) -> Layout:
    """What is stored of the deltas of a shard: scales, if there are any, come first and so lie aligned."""
    deltas = {name: (dtype, shape) for name, shape in shapes.items()}
    if dtype not in DELTA_LIMITS:
        return deltas
    scales = {scales_name(name): (torch.float32, (blocks_of(math.prod(shape)),)) for name, shape in shapes.items()}
    return scales | deltas
