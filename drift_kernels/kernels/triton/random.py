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
def _whole_index(i, origin, width, pitch):
    return origin + i + tl.where(width == 0, 0, i // tl.maximum(width, 1) * (pitch - width))


@_jit
def _philox_each(i, row, step, stream: tl.constexpr):
    """The words of the elements i .. i + 7, of which each may be anywhere in the whole tensor: a queue of halves."""
    key, origin, width, pitch = row[RANDOM_KEY], row[ORIGIN], row[WIDTH], row[PITCH]
    words0, words1, words2, words3 = i.to(tl.uint32), i.to(tl.uint32), i.to(tl.uint32), i.to(tl.uint32)
    for j in range(8):
        index = _whole_index(i + j, origin, width, pitch)
        x0, x1, x2, x3 = _philox(index // 8, key, step, stream)
        word = tl.where(index & 4 != 0, tl.where(index & 2 != 0, x3, x2), tl.where(index & 2 != 0, x1, x0))
        half = tl.where(index & 1 != 0, word & 0xFFFF0000, word << 16)
        words0, words1 = (words0 >> 16) | (words1 << 16), (words1 >> 16) | (words2 << 16)
        words2, words3 = (words2 >> 16) | (words3 << 16), (words3 >> 16) | half
    return words0, words1, words2, words3


@_jit
def _draw(row, step, stream: tl.constexpr, start, block: tl.constexpr):
    """16 random bits for each of the elements start .. start + block, as formats.philox.random_bits has them; start is
    a multiple of 8. One call for eight elements, where a shard does not cut through the eights of the whole tensor."""
    key, origin, width, pitch = row[RANDOM_KEY], row[ORIGIN], row[WIDTH], row[PITCH]
    i = (start + tl.arange(0, block // 8) * 8).to(tl.int64)
    if (origin | width | pitch) % 8 == 0:
        x0, x1, x2, x3 = _philox(_whole_index(i, origin, width, pitch) // 8, key, step, stream)
    else:
        x0, x1, x2, x3 = _philox_each(i, row, step, stream)
    words = tl.permute(tl.join(tl.join(x0, x1), tl.join(x2, x3)), 0, 2, 1)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [block])
