"""States and deltas that may be one-byte codes, with the scales of their blocks (formats/blocks.py)."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .access import _line, _load, _load_bits, _pointer, _top
from .jit import _jit, missing
from .layout import SCALE_BLOCK

if missing is None:
    import triton.language as tl


@_jit
def _scales(address, start, lines: tl.constexpr):
    """Pointers to the scale of each line, [lines]."""
    return address.to(tl.pointer_type(tl.float32)) + (start // SCALE_BLOCK + tl.arange(0, lines) // (SCALE_BLOCK // 8))


@_jit
def _load_scales(address, start, end, lines: tl.constexpr, aligned: tl.constexpr):
    """Load the scale of each line, float32 [lines, 1]; 0 for lines past the end."""
    if aligned:
        scale = tl.load(_scales(address, start, lines))
    else:
        scale = tl.load(_scales(address, start, lines), mask=start + tl.arange(0, lines) * 8 < end, other=0)
    return scale[:, None]


@_jit
def _load_delta(address, scales, dtype: tl.constexpr, start, end, lines: tl.constexpr, aligned: tl.constexpr):
    x = _load(address, dtype, start, end, lines, aligned)
    if dtype == tl.int8 or dtype == tl.uint8:
        x = x * _load_scales(scales, start, end, lines, aligned)
    return x


@_jit
def _load_state(address, scales, dtype: tl.constexpr, start, end, lines: tl.constexpr, aligned: tl.constexpr):
    """Load a state as float32. int8 is exp_avg in codes, uint8 exp_avg_sq in codes."""
    if dtype == tl.int8:
        code = _load(address, dtype, start, end, lines, aligned)
        x = code * tl.abs(code) * _load_scales(scales, start, end, lines, aligned)
    elif dtype == tl.uint8:
        code = _top(_load_bits(address, dtype, start, end, lines, aligned), lines, aligned).to(tl.uint32, bitcast=True)
        root = (code >> 24).to(tl.float32) * _load_scales(scales, start, end, lines, aligned)
        x = root * root
    else:
        x = _load(address, dtype, start, end, lines, aligned)
    return x


@_jit
def _store_codes(address, scales, dtype: tl.constexpr, start, end, x, lines: tl.constexpr, aligned: tl.constexpr):
    """Store float32 `x` as codes (int8 for exp_avg, uint8 for exp_avg_sq) and the scales of its blocks, as in
    formats.blocks.encode_state."""
    line: tl.constexpr = SCALE_BLOCK // 8  # lines that share a scale
    moment: tl.constexpr = dtype == tl.int8
    limit: tl.constexpr = 127 if moment else 255
    coded = tl.abs(x) if moment else tl.sqrt_rn(x)
    largest = tl.max(coded.to(tl.uint32, bitcast=True), axis=1)
    largest = tl.max(tl.reshape(largest, [lines // line, line]), axis=1)
    largest = tl.reshape(tl.broadcast_to(largest[:, None], [lines // line, line]), [lines])
    scale = tl.div_rn(
        largest.to(tl.float32, bitcast=True), tl.full([lines], limit * limit if moment else limit, tl.float32)
    )
    scale = tl.where((largest != 0) & (scale < 1.1754943508222875e-38), 1.1754943508222875e-38, scale)
    scale = tl.where(largest >= 0x7F800000, float("nan"), scale)
    inverse = tl.where(scale > 0, tl.div_rn(tl.full([lines], 1.0, tl.float32), scale), 0.0)
    scaled = coded * inverse[:, None]
    root = tl.sqrt_rn(scaled) if moment else scaled
    nearest = (root + 12582912.0).to(tl.uint32, bitcast=True)  # the nearest integer is in the low bits
    code = (tl.minimum(nearest, 0x4B400000 + limit) - 0x4B400000).to(tl.int32)  # a NaN gets the limit
    code = tl.where(x < 0, -code, code) if moment else tl.maximum(code, (coded > 0).to(tl.int32))
    code = code.to(dtype)
    first = tl.arange(0, lines)
    if aligned:
        tl.store(_pointer(address, dtype, start) + _line(lines, 8), code)
        tl.store(_scales(scales, start, lines), scale, mask=first % line == 0)
    else:
        i = start + _line(lines, 8)
        tl.store(address.to(tl.pointer_type(dtype)) + i, code, mask=i < end)
        tl.store(_scales(scales, start, lines), scale, mask=(first % line == 0) & (start + first * 8 < end))
