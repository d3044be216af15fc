"""The triton backend's kernel of the bias alone; how it reaches its elements is said in triton_kernels.py."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .jit import _jit, missing
from .update import _fields, _load, _load_delta, _pointer, _span, _store

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
    block: tl.constexpr,
    aligned: tl.constexpr,
):
    """The elements begin..end, as in reference.bias_: grad = grad - delta_coef*delta."""
    grad_pointer = _pointer(grad, grad_dtype, aligned)
    delta_pointer = _pointer(delta, delta_dtype, aligned)
    for start in range(begin, end, block):
        i = start + tl.arange(0, block)
        g = _load(grad_pointer, i, end, aligned)
        g = g - delta_coef * _load_delta(delta_pointer, delta_scale, i, end, aligned)
        _store(grad_pointer, i, end, g, None, aligned)


@_jit
def _bias_chunk(
    table,
    grads,
    chunk_tensor,
    coefficients,
    grad_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    tensor = tl.load(chunk_tensor + tl.program_id(0)).to(tl.int64)
    delta, delta_scale, numel, first_chunk = _fields(table, tensor, 14)[6:10]
    grad = tl.load(grads + tensor)
    delta_coef = _fields(coefficients, tensor, 12)[1]
    begin, middle, end = _span(numel, first_chunk, grad | delta, chunk_size, block)
    tensors = (grad, delta, delta_scale, delta_coef)
    _bias(*tensors, begin, middle, grad_dtype, delta_dtype, block, True)
    _bias(*tensors, middle, end, grad_dtype, delta_dtype, block // 2, False)
