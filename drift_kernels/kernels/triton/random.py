"""Random bits in the triton backend's kernels, bitwise identical to formats.philox.random_bits."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .jit import _jit, missing
from .layout import ORIGIN, PITCH, WIDTH

if missing is None:
    import triton.language as tl


@_jit
def _philox(block, key, step, stream: tl.constexpr):
    """The four words of Philox for each of these blocks of eight elements of the whole tensor."""
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
    # Avoid a 64-bit division per thread, which would be a function call.
    run = rest.to(tl.uint32) // tl.minimum(width, 1024).to(tl.uint32)
    return first + tl.where(width < 1024, run, (rest >= width).to(tl.uint32))


@_jit
def _whole_index(row, start, lines: tl.constexpr, aligned: tl.constexpr):
    """int64 indices in the whole tensor: of the first element of each line; on the general path, of each element."""
    offset = tl.arange(0, lines) * 8
    if not aligned:
        offset = offset[:, None] + tl.arange(0, 8)[None, :]
    index = row[ORIGIN] + start + offset
    if row[WIDTH] != 0:
        index += _run(start, offset, row[WIDTH]) * (row[PITCH] - row[WIDTH])
    return index


@_jit
def _draw(index, key, step, stream: tl.constexpr, lines: tl.constexpr, aligned: tl.constexpr):
    """Draw 16 random bits for each element of a tile, uint32 [lines, 8], as in formats.philox.random_bits. On the
    aligned path, one call serves a line, because its elements form a block of eight in the whole tensor too."""
    x0, x1, x2, x3 = _philox(index >> 3, key, step, stream)
    if aligned:
        words = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [lines, 4])
        bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [lines, 8])
    else:
        word = tl.where(index & 4 != 0, tl.where(index & 2 != 0, x3, x2), tl.where(index & 2 != 0, x1, x0))
        bits = tl.where(index & 1 != 0, word >> 16, word & 0xFFFF)
    return bits
