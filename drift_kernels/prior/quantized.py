"""8-bit deltas: int8 or float8_e4m3fn codes, and a float32 scale for every block of 128 elements (formats/blocks.py).

delta[i] = float32(code[i]) * scale[i // BLOCK]      with i the flat index; a single float32 multiplication
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PriorError
from ..formats.blocks import BLOCK, DELTA_LIMITS, blocks_of, decode_delta, encode_delta
from .norms import CHUNK, norm

Box = tuple[slice, ...]  # a part of a tensor: one slice per dimension


@dataclass(frozen=True, eq=False)
class QuantizedDelta:
    """An 8-bit delta: `codes` of the delta's shape, int8 or float8_e4m3fn, contiguous; `scales` float32
    [ceil(numel / BLOCK)], contiguous, on the same device.

    Raises PriorError if codes and scales do not fit each other. `check_scales` checks the values of scales.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype not in DELTA_LIMITS or not self.codes.is_contiguous():
            raise PriorError(f"codes must be int8 or float8_e4m3fn and contiguous, got {_description(self.codes)}")
        expected = (blocks_of(self.codes.numel()),)
        fitting = self.scales.dtype == torch.float32 and self.scales.shape == expected and self.scales.is_contiguous()
        if not fitting or self.scales.device != self.codes.device:
            raise PriorError(
                f"the scales do not fit the codes: expected contiguous torch.float32 {list(expected)} on "
                f"{self.codes.device}, got {_description(self.scales)} on {self.scales.device}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str, *, copy: bool = False) -> QuantizedDelta:
        """Return the delta on `device`; itself if it is there already, unless `copy`."""
        return QuantizedDelta(self.codes.to(device, copy=copy), self.scales.to(device, copy=copy))

    def expand(self) -> Tensor:
        """Return the delta as a new float32 tensor of the codes' shape."""
        return decode_delta(self.codes, self.scales)

    def part(self, box: Box) -> QuantizedDelta | Tensor:
        """The elements in a box: as codes if it cuts no block, otherwise expanded to float32."""
        begins, ends = ([part.indices(n)[i] for part, n in zip(box, self.shape, strict=True)] for i in (0, 1))
        row, whole_rows = math.prod(self.shape[1:]), all(b == 0 for b in begins[1:]) and ends[1:] == [*self.shape[1:]]
        begin, end = begins[0] * row, ends[0] * row
        if whole_rows and begin % BLOCK == 0 and (end % BLOCK == 0 or ends[0] == self.shape[0]):
            return QuantizedDelta(self.codes[box], self.scales[begin // BLOCK : blocks_of(end)])
        if not any(n % BLOCK for n in (self.shape[-1], begins[-1], ends[-1])):
            scales = self.scales.view(*self.shape[:-1], self.shape[-1] // BLOCK)
            of_blocks = (*box[:-1], slice(begins[-1] // BLOCK, ends[-1] // BLOCK))
            return QuantizedDelta(self.codes[box].contiguous(), scales[of_blocks].contiguous().view(-1))
        return self.expand()[box].contiguous()

    def norm(self) -> float:
        """norm(delta), expanding CHUNK elements at a time."""
        codes = self.codes.reshape(-1).split(CHUNK)
        scales = self.scales.split(CHUNK // BLOCK)
        return math.hypot(*(norm(QuantizedDelta(*piece).expand()) for piece in zip(codes, scales, strict=True)))

    def check_scales(self) -> None:
        """Raise PriorError if a scale is negative, NaN or Inf."""
        if not bool(((self.scales >= 0) & self.scales.isfinite()).all()):
            raise PriorError("scales must be finite and not negative")


def quantize(delta: Tensor, dtype: torch.dtype) -> QuantizedDelta:
    """Quantise a delta to codes of `dtype`, torch.int8 or torch.float8_e4m3fn, on its device.

    The scale of a block is absmax/127 (int8) or absmax/448 (float8_e4m3fn), and a code is delta/scale, both in float32;
    codes are rounded to nearest, ties to even. A block of zeros, or of values so small that its scale would be
    subnormal, has scale 0 and codes 0. A NaN or Inf makes its block's scale NaN or Inf. Raises ValueError for any other
    dtype.
    """
    if dtype not in DELTA_LIMITS:
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    return QuantizedDelta(*encode_delta(delta, dtype))


def scales_name(name: str) -> str:
    """The name that the scales of the delta `name` are stored under."""
    return f"{name}.scales"


def _description(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else "non-contiguous "
    return f"{layout}{tensor.dtype} {list(tensor.shape)}"
