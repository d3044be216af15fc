"""The two kernels of grad_stats: the sums of every chunk, then those of every tensor."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .access import _fields, _load_bits, _span, _to_float
from .codes import _load_scales
from .jit import _jit, missing
from .layout import DELTA, DELTA_SCALE, FIRST_CHUNK, NUMEL, ROW

if missing is None:
    import triton.language as tl


@_jit
def _request(
    tensors,
    start,
    end,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    lines: tl.constexpr,
    tiles: tl.constexpr,
    aligned: tl.constexpr,
):
    """Load what `_add` needs of `tiles` tiles, as raw bits."""
    found = ()
    for tile in tl.static_range(tiles):
        at = start + tile * lines * 8
        of_tile = (_load_bits(tensors[0], grad_dtype, at, end, lines, aligned, 64),)
        if delta_dtype is not None:
            of_tile += (_load_bits(tensors[1], delta_dtype, at, end, lines, aligned, 64),)  # type: ignore[assignment]
            if delta_dtype.primitive_bitwidth == 8:
                of_tile += (_load_scales(tensors[2], at, end, lines, aligned),)  # type: ignore[assignment]
        found += (of_tile,)  # type: ignore[assignment]
    return found


@_jit
def _add(
    grad_grad,
    grad_delta,
    requested,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    lines: tl.constexpr,
    tiles: tl.constexpr,
    aligned: tl.constexpr,
):
    for tile in tl.static_range(tiles):
        of_tile = requested[tile]
        g = _to_float(of_tile[0], grad_dtype, lines, aligned)
        grad_grad += g * g
        if delta_dtype is not None:
            delta = _to_float(of_tile[1], delta_dtype, lines, aligned)
            if delta_dtype.primitive_bitwidth == 8:
                delta *= of_tile[2]
            grad_delta += g * delta
    return grad_grad, grad_delta


@_jit
def _sums(
    tensors,
    begin,
    end,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    lines: tl.constexpr,
    tiles: tl.constexpr,
    aligned: tl.constexpr,
):
    """Return sum(g*g) and sum(g*delta) of the elements begin..end (at least one), float64 [2].

    Each element of a tile has a lane, which sums in float32; lanes are summed in float64. The tiles of the next
    iteration are requested before those of the current one are used.
    """
    grad_grad = tl.zeros([lines, 8], tl.float32)
    grad_delta = tl.zeros([lines, 8], tl.float32)
    turn: tl.constexpr = tiles * lines * 8
    requested = _request(tensors, begin, end, grad_dtype, delta_dtype, lines, tiles, aligned)
    for start in range(begin + turn, end, turn):
        following = _request(tensors, start, end, grad_dtype, delta_dtype, lines, tiles, aligned)
        grad_grad, grad_delta = _add(grad_grad, grad_delta, requested, grad_dtype, delta_dtype, lines, tiles, aligned)
        requested = following
    grad_grad, grad_delta = _add(grad_grad, grad_delta, requested, grad_dtype, delta_dtype, lines, tiles, aligned)
    lanes = tl.reshape(tl.join(grad_grad, grad_delta), [lines * 8, 2])
    return tl.sum(lanes.to(tl.float64), axis=0)


@_jit
def _sum_chunk(
    table,
    grads,
    chunk_tensor,
    partials,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    chunk_size: tl.constexpr,
    lines: tl.constexpr,
    tiles: tl.constexpr,
):
    """The first stage of grad_stats: the sums of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk_tensor + chunk).to(tl.int64)
    row = _fields(table, tensor, ROW)
    grad = tl.load(grads + tensor)
    together = grad
    if delta_dtype is not None:
        together |= row[DELTA]
    begin, middle, end = _span(row[NUMEL], row[FIRST_CHUNK], together, chunk_size, tiles * lines * 8)
    tensors = (grad, row[DELTA], row[DELTA_SCALE])
    sums = tl.zeros([2], tl.float64)
    if begin < middle:
        sums = _sums(tensors, begin, middle, grad_dtype, delta_dtype, lines, tiles, True)
    # There are half as many lanes, so sum half a chunk at a time: no lane sums more products than on the aligned path.
    for start in range(middle, end, chunk_size // 2):
        stop = tl.minimum(start + chunk_size // 2, end)
        sums += _sums(tensors, start, stop, grad_dtype, delta_dtype, lines // 2, 1, False)
    tl.store(partials + chunk * 2 + tl.arange(0, 2), sums)


@_jit
def _sum_tensor(table, partials, out, chunk_size: tl.constexpr, block: tl.constexpr):
    """The second stage: the sums of one tensor, over its chunks in a fixed order."""
    tensor = tl.program_id(0).to(tl.int64)
    row = _fields(table, tensor, ROW)
    chunks = (row[NUMEL] + chunk_size - 1) // chunk_size
    pair = tl.arange(0, 2)
    sums = tl.zeros([block, 2], tl.float64)
    for start in range(0, chunks, block):
        chunk = (start + tl.arange(0, block))[:, None]
        sums += tl.load(partials + (row[FIRST_CHUNK] + chunk) * 2 + pair, mask=chunk < chunks, other=0)
    tl.store(out + tensor * 2 + pair, tl.sum(sums, axis=0))
