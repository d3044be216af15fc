"""The files of a prior: distributing deltas over them, and writing them piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from torch import Tensor

from ..errors import PriorError
from .files import size_in_bytes
from .forms import Form, Shapes
from .record import PRIOR_INDEX_NAME
from .writing import TensorFileWriter, write_json

Progress = Callable[[int, int], None]
"""Called with the number of elements done so far and the total number."""


Pieces = Callable[[Sequence[str]], Generator[tuple[int, dict[str, Tensor]], None, None]]
"""Yields the deltas of these names, end to end, in pieces: the number of elements, and 1-D tensors to append to tensors
of the prior's files. A piece is valid until the next one is requested."""

_WRITERS = 3  # shards open at a time: one is being written, two may wait for the disk


def check_names(shapes: Shapes, form: Form) -> None:
    """Raise PriorError if a delta has the name of a part of another one."""
    for name, shape in shapes.items():
        for tensor in form.layout({name: shape}):
            if tensor != name and tensor in shapes:
                part = tensor.rpartition(".")[2]
                raise PriorError(f"{tensor} is a tensor of the checkpoints, but the {part} of {name} has the same name")


def write_deltas(
    folder: Path, shapes: Shapes, form: Form, max_bytes: int, pieces: Pieces, progress: Progress | None
) -> dict[str, int]:
    """Write deltas of these shapes in shards of up to `max_bytes`, and their index. Each shard is flushed to disk while
    the next one is made. Returns the checksums of the tensors."""
    shards = _plan_shards(shapes, form, max_bytes)
    total, done = sum(map(math.prod, shapes.values())), 0
    total_size, weight_map, checksums = 0, {}, {}
    with ExitStack() as files, ThreadPoolExecutor(max_workers=1) as disk:
        synced = []
        for number, shard in enumerate(shards, 1):
            name = f"prior-{number:05d}-of-{len(shards):05d}.safetensors"
            layout = form.layout({delta: shapes[delta] for delta in shard})
            writer = files.enter_context(TensorFileWriter(folder / name, layout))
            with closing(pieces(shard)) as deltas:  # in all cases, its threads end before the files are closed
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


def _plan_shards(shapes: Shapes, form: Form, max_bytes: int) -> list[list[str]]:
    """Split consecutive deltas into shards of up to `max_bytes`; a larger delta has its own shard."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = sum(map(size_in_bytes, form.layout({name: shape}).values()))
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards
