"""The kernels of grad_stats, in two stages: the sums of every chunk, then those of every tensor."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .access import _fields, _load, _pointer, _span
from .codes import _load_delta
from .jit import _jit, missing
from .layout import DELTA, DELTA_SCALE, FIRST_CHUNK, NUMEL, ROW

if missing is None:
    import triton.language as tl


@_jit
def _sums(
    grad,
    delta,
    delta_scale,
    begin,
    end,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    block: tl.constexpr,
    aligned: tl.constexpr,
):
    """sum(g*g) and sum(g*delta) of the elements begin..end: `block` lanes in float32, their sum in float64."""
    grad_pointer = _pointer(grad, grad_dtype, aligned)
    if delta_dtype is not None:
        delta_pointer = _pointer(delta, delta_dtype, aligned)
    grad_grad = tl.zeros([block], tl.float32)
    grad_delta = tl.zeros([block], tl.float32)
    for start in range(begin, end, block):
        i = start + tl.arange(0, block)
        g = _load(grad_pointer, i, end, aligned)
        grad_grad += g * g
        if delta_dtype is not None:
            grad_delta += g * _load_delta(delta_pointer, delta_scale, i, end, aligned)
    return tl.sum(grad_grad.to(tl.float64)), tl.sum(grad_delta.to(tl.float64))


@_jit
def _sum_chunk(
    table,
    grads,
    chunk_tensor,
    partials,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    """The first stage of grad_stats: the sums of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk_tensor + chunk).to(tl.int64)
    row = _fields(table, tensor, ROW)
    grad = tl.load(grads + tensor)
    together = grad
    if delta_dtype is not None:
        together |= row[DELTA]
    begin, middle, end = _span(row[NUMEL], row[FIRST_CHUNK], together, chunk_size, block)
    tensors = (grad, row[DELTA], row[DELTA_SCALE])
    grad_grad, grad_delta = _sums(*tensors, begin, middle, grad_dtype, delta_dtype, block, True)
    more_grad_grad, more_grad_delta = _sums(*tensors, middle, end, grad_dtype, delta_dtype, block // 2, False)
    tl.store(partials + chunk * 2, grad_grad + more_grad_grad)
    tl.store(partials + chunk * 2 + 1, grad_delta + more_grad_delta)


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
