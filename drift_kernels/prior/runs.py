"""Deltas in runs of rows, which are read and processed one at a time, in float32, to combine and apply priors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..formats.blocks import BLOCK
from .fusion import Source
from .norms import CHUNK
from .prior import Prior
from .quantized import Box


@dataclass(frozen=True)
class Rows:
    """A run of rows of a tensor; `box` is None for a tensor without dimensions."""

    box: Box | None
    start: int  # the index of the first element, in flat order
    count: int  # elements


def rows_of(shape: tuple[int, ...]) -> Iterator[Rows]:
    """Yield the runs of a tensor of this shape, of about CHUNK elements each, or of a few rows if these are longer.
    Each begins where a block of codes does."""
    if not shape:
        yield Rows(None, 0, 1)
        return
    row = math.prod(shape[1:])
    if row == 0:
        return
    step = BLOCK // math.gcd(row, BLOCK)
    step *= max(1, CHUNK // (step * row))
    inner = tuple(slice(0, size) for size in shape[1:])
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        yield Rows((slice(begin, end), *inner), begin * row, (end - begin) * row)


def read_rows(prior: Prior, delta: str | Source, rows: Rows) -> Tensor:
    """Read rows of a delta in any form, as float32, 1-D, on the CPU. The result must not be written to."""
    stored = prior.load_stored(delta, "cpu", copy=False, box=rows.box)
    return (stored if isinstance(stored, Tensor) else stored.expand()).reshape(-1).float()
