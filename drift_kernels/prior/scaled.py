"""FP8 checkpoints: weights stored as float8 codes and scales, which are multiplied while reading.

A scale is for a block of a matrix (DeepSeek-V3, Qwen3-FP8: `X.weight_scale_inv`, [128, 128] unless the config says
otherwise), for a row, or for the whole matrix (`X.weight_scale`, as written by compressed-tensors, FBGEMM and
ModelOpt). In all cases, the weight is code * scale, rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import Place, Source, StoredTensor, boxes_of
from .reading import OpenFiles

CODES_OF_SCALES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_SUFFIXES = ("_scale_inv", "_scale")
_BLOCK = (128, 128)


@dataclass(frozen=True)
class ScaledCodes(Source):
    """code * scale: `scales` has one row per `block[0]` rows of a matrix, with one entry per `block[1]` columns. The
    tensor is a sequence of matrices of `rows` rows."""

    name: str
    codes: StoredTensor
    scales: StoredTensor
    rows: int
    block: tuple[int, int]

    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.codes.shape

    def places(self) -> Iterator[Place]:
        yield from self.codes.places()
        yield from self.scales.places()

    def read_from(self, files: OpenFiles, flat: Tensor, start: int) -> None:
        flat.copy_(self.codes.read_flat_from(files, start, start + flat.numel()))
        columns = self.shape[-1]
        first = start // columns
        scales = self._scales_of(files, first, (start + flat.numel() - 1) // columns + 1)
        for box, row, column in boxes_of(flat, start, columns):
            self._scale(box, scales[row - first : row - first + len(box)], column)

    def _scale(self, box: Tensor, scales: Tensor, column: int) -> None:
        """Multiply rows, from `column` on, by their scales. Whole blocks are multiplied in one operation."""
        length, width = self.block[1], box.shape[1]
        begin = min(-column % length, width)
        first, blocks = (column + begin) // length, (width - begin) // length
        end = begin + blocks * length
        if begin:
            number = column // length
            box[:, :begin] *= scales[:, number : number + 1]
        if blocks:
            box[:, begin:end].unflatten(1, (blocks, length)).mul_(scales[:, first : first + blocks].unsqueeze(2))
        if end < width:
            box[:, end:] *= scales[:, first + blocks : first + blocks + 1]

    def _scales_of(self, files: OpenFiles, first: int, last: int) -> Tensor:
        """The scales of the rows from `first` to `last`, counted across all matrices, in float32."""
        matrix_rows, columns = -(-self.rows // self.block[0]), -(-self.shape[-1] // self.block[1])
        numbers = torch.arange(first, last, dtype=torch.int64, device="cpu")
        lines = numbers // self.rows * matrix_rows + numbers % self.rows // self.block[0]
        begin, end = int(lines[0]), int(lines[-1]) + 1
        scales = self.scales.read_flat_from(files, begin * columns, end * columns).float()
        if not scales.isfinite().all():
            raise CheckpointError(f"{self.scales.path}: damaged: the scales of {self.name} contain NaN or Inf")
        return scales.view(-1, columns)[lines - begin]


def with_scales(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Source]:
    """Return the tensors, with codes and their scales combined into weights. Other quantised tensors are unchanged.

    Raises CheckpointError if scales do not fit their codes.
    """
    found: dict[str, Source] = dict(tensors)
    block = _block_size(config)
    for name, codes in tensors.items():
        if codes.dtype not in CODES_OF_SCALES or len(codes.shape) < 2 or f"{name}_zero_point" in tensors:
            continue
        for scales_name in (name + suffix for suffix in _SUFFIXES):
            scales = tensors.get(scales_name)
            if scales is not None and scales.dtype in _SCALES:
                found[name] = _scaled(name, codes, scales, block)
                del found[scales_name]
                break
    return found


def _scaled(name: str, codes: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> ScaledCodes:
    *stack, rows, columns = codes.shape
    if scales.numel == 1:
        whole = codes.numel // max(columns, 1)
        return ScaledCodes(name, codes, scales, whole, (max(whole, 1), max(columns, 1)))
    if scales.shape == (*stack, -(-rows // block[0]), -(-columns // block[1])):
        return ScaledCodes(name, codes, scales, rows, block)
    if scales.shape in ((*stack, rows, 1), (*stack, rows)):
        return ScaledCodes(name, codes, scales, rows, (1, columns))
    raise CheckpointError(
        f"{scales.path}: the scales of {name} have shape {list(scales.shape)}: expected one for each block of "
        f"{block[0]} by {block[1]}, one for each row, or one for all, of codes of shape {list(codes.shape)}"
    )


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """The block size in the config, of transformers' FP8 or of a group of compressed-tensors."""
    for part in (config, *config.values()):
        quantised = part.get("quantization_config") if isinstance(part, Mapping) else None
        if not isinstance(quantised, Mapping):
            continue
        groups = quantised.get("config_groups")
        groups = groups.values() if isinstance(groups, Mapping) else ()
        weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
        sizes = [quantised.get("weight_block_size")]
        sizes += [entry.get("block_structure") for entry in weights if isinstance(entry, Mapping)]
        for size in sizes:
            if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
                return size[0], size[1]
    return _BLOCK
