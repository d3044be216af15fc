"""How the kernels reach rows, coefficients and elements.

A program works through one chunk of one tensor. Where every address of the row is a multiple of 16, whole blocks take
the aligned path: 16-byte accesses and no mask. The rest of the chunk, or all of it, takes the general path, element by
element and in blocks of half the size (of one size, the compiler would give both paths one layout). The kernel decides,
row by row: a tensor that starts anywhere (a view into a flat buffer) costs its neighbours nothing, and no kernel is
compiled for an address or a size, only for a combination of dtypes.

Arithmetic is float32. bfloat16 is loaded, rounded and stored as its bits, because Triton's interpreter converts it
wrongly; float16 it converts rightly, but for the bits of a NaN.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from .jit import _jit, missing

if missing is None:
    import triton.language as tl


@_jit
def _fields(table, row, count: tl.constexpr):
    """A row of a table as a tuple, to be read by the names in layout.py. `count`: ROW or COEFFICIENTS."""
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
def _pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):
    """To elements of `dtype`; bfloat16 is uint16."""
    stored: tl.constexpr = tl.uint16 if dtype == tl.bfloat16 else dtype
    pointer = address.to(tl.pointer_type(stored))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@_jit
def _load_bits(pointer, index, end, aligned: tl.constexpr):
    """Elements as stored. On the aligned path all of `index` is there, on the general path what is below `end`."""
    return tl.load(pointer + index) if aligned else tl.load(pointer + index, mask=index < end, other=0)


@_jit
def _load(pointer, index, end, aligned: tl.constexpr):
    """Elements as float32."""
    x = _load_bits(pointer, index, end, aligned)
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.uint8:  # e4m3: the exponent moves by an exact multiplication, which also normalises subnormals
        magnitude = ((x.to(tl.uint32) & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        x = (magnitude.to(tl.uint32, bitcast=True) | (x.to(tl.uint32) & 0x80) << 24).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@_jit
def _store(pointer, index, end, x, random, aligned: tl.constexpr):
    """float32 `x` rounded to nearest, ties to even, or by `random` bits; a NaN becomes the canonical quiet NaN of a
    narrower dtype."""
    if pointer.dtype.element_ty == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        if random is None:
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        else:
            rounded = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits + random, bits)
        x = (tl.where(x != x, 0x7FC00000, rounded) >> 16).to(tl.uint16)
    elif pointer.dtype.element_ty == tl.float16:
        nearest = x.to(tl.float16).to(tl.uint16, bitcast=True)
        x = tl.where(x != x, 0x7E00, nearest).to(tl.float16, bitcast=True)
    _store_bits(pointer, index, end, x, aligned)


@_jit
def _store_bits(pointer, index, end, x, aligned: tl.constexpr):
    if aligned:
        tl.store(pointer + index, x)
    else:
        tl.store(pointer + index, x, mask=index < end)
