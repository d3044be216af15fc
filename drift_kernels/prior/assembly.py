"""Assembling the delta of a live parameter from stored ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..formats.blocks import BLOCK
from .deltas import Delta, expanded
from .fusion import Part, Source
from .quantized import Box, QuantizedDelta
from .record import DeltaInfo

Read = Callable[[str, "Box | None"], "Delta"]
"""Reads the delta of a name, or the part of it in a box."""


def assembled_info(source: Source, infos: Mapping[str, DeltaInfo], norm_of: Callable[[Part], float]) -> DeltaInfo:
    """The metadata of the whole, from its parts. `norm_of` computes the norm of a part that is not a whole delta."""
    found = [infos[part.name] for part in source.parts]
    whole = all(part.of is None for part in source.parts)
    if whole and len(found) == 1:
        return replace(found[0], shape=source.shape)
    dtypes = {info.dtype for info in found}
    param_norms = [info.param_norm for info in found if info.param_norm is not None and whole]
    return DeltaInfo(
        shape=source.shape,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        delta_norm=math.hypot(
            *(i.delta_norm if p.of is None else norm_of(p) for p, i in zip(source.parts, found, strict=True))
        ),
        param_norm=math.hypot(*param_norms) if len(param_norms) == len(found) else None,
    )


def assemble(
    source: Source, ndims: Mapping[str, int], read: Read, box: Box | None, device: torch.device | str | None
) -> Delta:
    """Return the delta, or the part of it in a box, reading no more than necessary. `ndims`: of the stored deltas.

    The result is in codes if all parts are and their blocks are consecutive, bfloat16 if all parts are bfloat16
    tensors, and float32 otherwise.
    """
    wanted = tuple(slice(0, size) for size in source.shape) if box is None else box
    sizes = tuple(part.stop - part.start for part in wanted)
    pieces: list[tuple[Box, Delta]] = []
    for part in source.parts:
        common = tuple(
            slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(part.into, wanted, strict=True)
        )
        if any(cut.stop <= cut.start for cut in common):
            continue
        piece = read(part.name, _in_stored(part, common, ndims[part.name]))
        if part.transposed:
            piece = expanded(piece).transpose(-2, -1)
        pieces.append((_relative(common, wanted), piece))
    codes = [piece for _, piece in pieces if isinstance(piece, QuantizedDelta)]
    if pieces and len(codes) == len(pieces) and _runs_on([into for into, _ in pieces], sizes):
        joined = torch.cat([delta.codes.view(-1).view(torch.uint8) for delta in codes]).view(codes[0].dtype)
        scales = torch.cat([delta.scales for delta in codes])
        return QuantizedDelta(joined.view(sizes), scales).to(device or scales.device)
    all_bfloat16 = all(isinstance(piece, Tensor) and piece.dtype == torch.bfloat16 for _, piece in pieces)
    dtype = torch.bfloat16 if pieces and all_bfloat16 else torch.float32
    delta = torch.empty(sizes, dtype=dtype, device=device or (pieces[0][1].device if pieces else "cpu"))
    for into, piece in pieces:
        target = delta[into]
        target.copy_(expanded(piece).reshape(target.shape))
    return delta


def _relative(box: Box, to: Box) -> Box:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, to, strict=True))


def _in_stored(part: Part, common: Box, ndim: int) -> Box | None:
    """The box of the stored delta that fills `common`; None for all of it."""
    if common == part.into and part.of is None:
        return None
    inner = _relative(common, part.into)
    if part.transposed:
        inner = (*inner[:-2], inner[-1], inner[-2])
    inner = inner[max(len(inner) - ndim, 0) :]  # a stored matrix lacks the dimension of the stack
    if part.of is None:
        return inner
    lead = len(part.of) - len(inner)
    shifted = (slice(a.start + b.start, a.stop + b.start) for a, b in zip(inner, part.of[lead:], strict=True))
    return (*part.of[:lead], *shifted)


def _runs_on(boxes: list[Box], sizes: tuple[int, ...]) -> bool:
    """Whether the boxes are consecutive runs of a tensor's flat elements that begin where blocks of codes do."""
    end = 0
    for box in boxes:
        lengths = [part.stop - part.start for part in box]
        cut = max((d for d in range(len(sizes)) if lengths[d] != sizes[d]), default=0)
        begin = sum(part.start * math.prod(sizes[d + 1 :]) for d, part in enumerate(box))
        if begin != end or begin % BLOCK or any(length != 1 for length in lengths[:cut]):
            return False
        end = begin + math.prod(lengths)
    return True
