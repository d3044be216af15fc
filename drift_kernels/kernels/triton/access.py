"""Access to rows, coefficients and elements in kernels.

A program processes one chunk of one tensor, tile by tile; a tile is lines of eight elements, [lines, 8]. If every
address in the row is a multiple of 16, whole tiles take the aligned path: a thread handles one line of each tensor, in
unmasked accesses of 16 bytes (8 bytes for codes). The rest of the chunk, or all of it, takes the general path, element
by element in tiles of half the size (with equal sizes, the compiler would give both paths the same layout). The kernel
decides this row by row, so a tensor at an arbitrary address (a view into a flat buffer) does not slow down others, and
kernels are compiled only for combinations of dtypes, never for an address or a size.

Elements narrower than 4 bytes are read as 4-byte words, and 2-byte elements are written as such, so that a register
holds two or four elements until they are used.

Arithmetic is float32. bfloat16 is converted through its bits, because Triton's interpreter converts it incorrectly;
float16 it converts correctly, except for the bits of a NaN.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from .jit import _jit, missing

if missing is None:
    import triton.language as tl


@_jit
def _fields(table, row, count: tl.constexpr):
    """Load a row of a table as a tuple, indexed by the names in layout.py. `count`: ROW or COEFFICIENTS."""
    fields = ()
    for field in tl.static_range(count):
        fields += (tl.load(table + row * count + field),)  # type: ignore[assignment]
    return fields


@_jit
def _span(numel, first_chunk, addresses, chunk_size: tl.constexpr, block: tl.constexpr):
    """The elements of this program's chunk: begin..middle for the aligned path, middle..end for the general path."""
    begin = (tl.program_id(0) - first_chunk) * chunk_size
    end = tl.minimum(begin + chunk_size, numel)
    whole_blocks = (end - begin) // block * block
    middle = begin + tl.where(addresses % 16 == 0, whole_blocks, 0)
    return begin, middle, end


@_jit
def _pointer(address, dtype: tl.constexpr, start):
    """A pointer to element `start` of a tensor, which must be aligned to 16 bytes there."""
    pointer = (address + start * (dtype.primitive_bitwidth // 8)).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16)


@_jit
def _line(lines: tl.constexpr, length: tl.constexpr):
    """[lines, length]: 0, 1, 2, ... line by line."""
    return tl.arange(0, lines)[:, None] * length + tl.arange(0, length)[None, :]


@_jit
def _load_bits(
    address, dtype: tl.constexpr, start, end, lines: tl.constexpr, aligned: tl.constexpr, word: tl.constexpr = 32
):
    """Load the raw bits of a tile, as a tuple: on the general path as elements, with 0 from `end` on; on the aligned
    path as words of `word` bits, or as two float32 blocks."""
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    if not aligned:
        stored: tl.constexpr = tl.uint16 if size == 2 else tl.uint8 if size == 1 else dtype
        i = start + _line(lines, 8)
        bits = (tl.load(address.to(tl.pointer_type(stored)) + i, mask=i < end, other=0),)
    elif size == 4:
        pointer = _pointer(address, dtype, start) + tl.arange(0, lines)[:, None] * 8 + tl.arange(0, 4)[None, :]
        bits = (tl.load(pointer), tl.load(pointer + 4))  # type: ignore[assignment]
    else:
        words: tl.constexpr = tl.uint32 if word == 32 else tl.uint64
        bits = (tl.load(_pointer(address + start * size, words, 0) + _line(lines, size * 64 // word)),)
    return bits


@_jit
def _words(bits, lines: tl.constexpr):
    """uint32 [lines, 2 or 4]: the words that the aligned path reads for elements narrower than 4 bytes."""
    words = bits[0]
    if words.dtype == tl.uint64:
        words = tl.reshape(tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32)), [lines, 2 * words.shape[1]])
    return words


@_jit
def _upper(bits, lines: tl.constexpr, aligned: tl.constexpr):
    """uint32 [lines, 8]: 2-byte elements in the upper halves."""
    if aligned:
        words = _words(bits, lines)
        x = tl.reshape(tl.join(words << 16, words & 0xFFFF0000), [lines, 8])
    else:
        x = bits[0].to(tl.uint32) << 16
    return x


@_jit
def _top(bits, lines: tl.constexpr, aligned: tl.constexpr):
    """int32 [lines, 8]: 1-byte elements in the highest byte; the lower bytes are undefined."""
    if aligned:
        words = _words(bits, lines)
        x = tl.join(tl.join(words << 24, words << 8), tl.join(words << 16, words))
        x = tl.reshape(x, [lines, 8])
    else:
        x = bits[0].to(tl.uint32) << 24
    return x.to(tl.int32, bitcast=True)


@_jit
def _to_float(bits, dtype: tl.constexpr, lines: tl.constexpr, aligned: tl.constexpr):
    """Convert a tile to float32; codes (int8, or e4m3 as uint8) without their scale."""
    if dtype == tl.float32:
        x = tl.reshape(tl.permute(tl.join(bits[0], bits[1]), 0, 2, 1), [lines, 8]) if aligned else bits[0]
    elif dtype == tl.bfloat16:
        x = _upper(bits, lines, aligned).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        x = (_upper(bits, lines, aligned) >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif dtype == tl.int8:
        x = (_top(bits, lines, aligned) >> 24).to(tl.float32)
    else:  # an exact multiplication shifts the exponent, and also normalises subnormals
        x = ((_top(bits, lines, aligned) >> 4) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return x


@_jit
def _load(address, dtype: tl.constexpr, start, end, lines: tl.constexpr, aligned: tl.constexpr):
    """Load a tile as float32."""
    return _to_float(_load_bits(address, dtype, start, end, lines, aligned), dtype, lines, aligned)


@_jit
def _store(
    address,
    dtype: tl.constexpr,
    start,
    end,
    x,
    random,
    lines: tl.constexpr,
    aligned: tl.constexpr,
    converts: tl.constexpr,
):
    """Store float32 `x` rounded to nearest, ties to even, or by `random` bits. In a narrower dtype a NaN becomes the
    canonical quiet NaN. `converts`: the device has a conversion to bfloat16 that turns every NaN into 0x7fff."""
    if dtype == tl.float32:
        _store_float(address, start, end, x, lines, aligned)
    elif dtype == tl.bfloat16 and random is None and converts:
        bits = tl.minimum(x.to(tl.bfloat16).to(tl.int16, bitcast=True), 0x7FC0)  # numbers are less, infinities too
        bits = bits.to(tl.int16)  # Triton before 3.9 takes the minimum in 32 bits
        _store_upper(address, start, end, bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16, lines, aligned)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.float16:
            bits = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        elif random is None:
            bits += 0x7FFF + ((bits >> 16) & 1)
        else:
            bits += random  # cannot carry into the upper half of an infinity
        bits = tl.where(x != x, 0x7E000000 if dtype == tl.float16 else 0x7FC00000, bits)
        _store_upper(address, start, end, bits, lines, aligned)


@_jit
def _store_float(address, start, end, x, lines: tl.constexpr, aligned: tl.constexpr):
    if aligned:
        pointer = _pointer(address, tl.float32, start) + tl.arange(0, lines)[:, None] * 8 + tl.arange(0, 4)[None, :]
        first, second = tl.split(tl.permute(tl.reshape(x, [lines, 2, 4]), 0, 2, 1))
        tl.store(pointer, first)
        tl.store(pointer + 4, second)
    else:
        i = start + _line(lines, 8)
        tl.store(address.to(tl.pointer_type(tl.float32)) + i, x, mask=i < end)


@_jit
def _store_upper(address, start, end, bits, lines: tl.constexpr, aligned: tl.constexpr):
    """Store the upper halves of uint32 `bits`."""
    if aligned:
        even, odd = tl.split(tl.reshape(bits, [lines, 4, 2]))
        tl.store(_pointer(address + start * 2, tl.uint32, 0) + _line(lines, 4), (even >> 16) | (odd & 0xFFFF0000))
    else:
        i = start + _line(lines, 8)
        tl.store(address.to(tl.pointer_type(tl.uint16)) + i, (bits >> 16).to(tl.uint16), mask=i < end)
