"""Random bits in the triton backend's kernels, as formats.philox.random_bits has them."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .jit import _jit, missing
from .layout import ORIGIN, PITCH, RANDOM_KEY, WIDTH

if missing is None:
    import triton.language as tl


@_jit
def _philox(block, key, step, stream: tl.constexpr):
    """The four words of the counters of these blocks of eight elements of the whole tensor."""
    x0 = block.to(tl.uint32)
    x1 = (block >> 32).to(tl.uint32) | (stream << 30)
    x2 = tl.zeros_like(x0) + step
    x3 = tl.zeros_like(x0)
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        a, b = tl.umulhi(x0, 0xD2511F53), tl.umulhi(x2, 0xCD9E8D57)
        low_a, low_b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = b ^ x1 ^ key0, low_b, a ^ x3 ^ key1, low_a
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return x0, x1, x2, x3


@_jit
def _run(start, offset, width):
    """Which run of `width` elements each of the elements start + offset is in. `offset`: int32, less than 1024."""
    first = start // width
    rest = start - first * width + offset
    # No division of 64 bits for each thread: it would be a call.
    later = tl.where(width < 1024, rest.to(tl.uint32) // tl.minimum(width, 1024).to(tl.uint32), (rest >= width).to(tl.uint32))
    return first + later


@_jit
def _whole_index(start, offset, row):
    """In the whole tensor, of the elements start + offset."""
    index = row[ORIGIN] + start + offset
    if row[WIDTH] != 0:
        index += _run(start, offset, row[WIDTH]) * (row[PITCH] - row[WIDTH])
    return index


@_jit
def _philox_each(start, offset, row, step, stream: tl.constexpr):
    """The words of the elements start + offset .. start + offset + 7, of which each may be anywhere in the whole
    tensor: a queue of halves."""
    words0, words1, words2, words3 = (tl.zeros_like(offset).to(tl.uint32),) * 4
    for j in range(8):
        index = _whole_index(start, offset + j, row)
        x0, x1, x2, x3 = _philox(index // 8, row[RANDOM_KEY], step, stream)
        word = tl.where(index & 4 != 0, tl.where(index & 2 != 0, x3, x2), tl.where(index & 2 != 0, x1, x0))
        half = tl.where(index & 1 != 0, word & 0xFFFF0000, word << 16)
        words0, words1 = (words0 >> 16) | (words1 << 16), (words1 >> 16) | (words2 << 16)
        words2, words3 = (words2 >> 16) | (words3 << 16), (words3 >> 16) | half
    return words0, words1, words2, words3


@_jit
def _draw(row, step, stream: tl.constexpr, start, lines: tl.constexpr):
    """16 random bits for each element of a tile, [lines, 8], as formats.philox.random_bits has them. One call for a
    line, where a shard does not cut through the eights of the whole tensor."""
    offset = tl.arange(0, lines) * 8
    if (row[ORIGIN] | row[WIDTH] | row[PITCH]) % 8 == 0:
        x0, x1, x2, x3 = _philox(_whole_index(start, offset, row) // 8, row[RANDOM_KEY], step, stream)
    else:
        x0, x1, x2, x3 = _philox_each(start, offset, row, step, stream)
    words = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [lines, 4])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [lines, 8])
