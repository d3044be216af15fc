"""Elements that may be one-byte codes: states and deltas, with the scales of their blocks (formats/blocks.py)."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .access import _load, _load_bits, _store_bits
from .jit import _jit, missing
from .layout import SCALE_BLOCK

if missing is None:
    import triton.language as tl


@_jit
def _load_scales(scales, index, end):
    """The scale of each element: that of its block."""
    return tl.load(scales.to(tl.pointer_type(tl.float32)) + index // SCALE_BLOCK, mask=index < end, other=0)


@_jit
def _load_delta(pointer, scales, index, end, aligned: tl.constexpr):
    x = _load(pointer, index, end, aligned)
    if pointer.dtype.element_ty == tl.int8 or pointer.dtype.element_ty == tl.uint8:
        x = x * _load_scales(scales, index, end)
    return x


@_jit
def _load_state(pointer, scales, index, end, aligned: tl.constexpr):
    if pointer.dtype.element_ty == tl.int8:
        code = _load_bits(pointer, index, end, aligned).to(tl.int32)
        return (code * tl.abs(code)).to(tl.float32) * _load_scales(scales, index, end)
    if pointer.dtype.element_ty == tl.uint8:
        root = _load_bits(pointer, index, end, aligned).to(tl.float32) * _load_scales(scales, index, end)
        return root * root
    return _load(pointer, index, end, aligned)


@_jit
def _store_codes(pointer, scales, start, index, end, x, aligned: tl.constexpr):
    """float32 `x` as codes, int8 of a moment or uint8 of a variance, and the scales of its blocks; as
    formats.blocks.encode_state."""
    count: tl.constexpr = index.shape[0] // SCALE_BLOCK
    moment: tl.constexpr = pointer.dtype.element_ty == tl.int8
    limit: tl.constexpr = 127.0 if moment else 255.0
    coded = tl.abs(x) if moment else tl.sqrt_rn(x)
    largest = tl.max(tl.reshape(coded.to(tl.uint32, bitcast=True), [count, SCALE_BLOCK]), axis=1)
    scale = tl.div_rn(
        largest.to(tl.float32, bitcast=True), tl.full([count], limit * limit if moment else limit, tl.float32)
    )
    scale = tl.where((largest != 0) & (scale < 1.1754943508222875e-38), 1.1754943508222875e-38, scale)
    scale = tl.where(largest >= 0x7F800000, float("nan"), scale)
    inverse = tl.where(scale > 0, tl.div_rn(tl.full([count], 1.0, tl.float32), scale), 0.0)
    scaled = coded * tl.reshape(tl.broadcast_to(inverse[:, None], [count, SCALE_BLOCK]), [count * SCALE_BLOCK])
    root = tl.sqrt_rn(scaled) if moment else scaled
    nearest = (root + 12582912.0) - 12582912.0
    code = tl.where(nearest < limit, nearest, limit).to(tl.int32)
    code = tl.where(x < 0, -code, code) if moment else tl.where((code == 0) & (coded > 0), 1, code)
    _store_bits(pointer, index, end, code.to(pointer.dtype.element_ty), aligned)
    block = start // SCALE_BLOCK + tl.arange(0, count)
    tl.store(scales.to(tl.pointer_type(tl.float32)) + block, scale, mask=block * SCALE_BLOCK < end)
