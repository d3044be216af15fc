"""The kernel that only biases gradients. access.py describes how it accesses elements."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .access import _fields, _load, _span, _store
from .codes import _load_delta
from .jit import _jit, missing
from .layout import COEFFICIENTS, DELTA, DELTA_COEF, DELTA_SCALE, FIRST_CHUNK, NUMEL, ROW

if missing is None:
    import triton.language as tl


@_jit
def _bias(
    grad,
    delta,
    delta_scale,
    delta_coef,
    begin,
    end,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    converts: tl.constexpr,
    lines: tl.constexpr,
    aligned: tl.constexpr,
):
    """The elements begin..end, as in reference.bias_: grad = grad - delta_coef*delta."""
    for start in range(begin, end, lines * 8):
        g = _load(grad, grad_dtype, start, end, lines, aligned)
        g = g - delta_coef * _load_delta(delta, delta_scale, delta_dtype, start, end, lines, aligned)
        _store(grad, grad_dtype, start, end, g, None, lines, aligned, converts)


@_jit
def _bias_chunk(
    table,
    grads,
    chunk_tensor,
    coefficients,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    converts: tl.constexpr,
    chunk_size: tl.constexpr,
    lines: tl.constexpr,
):
    tensor = tl.load(chunk_tensor + tl.program_id(0)).to(tl.int64)
    row = _fields(table, tensor, ROW)
    grad = tl.load(grads + tensor)
    delta_coef = _fields(coefficients, tensor, COEFFICIENTS)[DELTA_COEF]
    begin, middle, end = _span(row[NUMEL], row[FIRST_CHUNK], grad | row[DELTA], chunk_size, lines * 8)
    tensors = (grad, row[DELTA], row[DELTA_SCALE], delta_coef)
    _bias(*tensors, begin, middle, grad_dtype, delta_dtype, converts, lines, True)
    _bias(*tensors, middle, end, grad_dtype, delta_dtype, converts, lines // 4, False)
