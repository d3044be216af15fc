"""The kernels of the triton backend: one launch per primitive for all tensors of a plan, from a table of addresses.

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
from .random import _draw

if missing is None:
    import triton.language as tl


@_jit
def _fields(table, row, count: tl.constexpr):
    """A row as a tuple: the 14 fields of plan.ROW_FIELDS, or the 12 of coefficients.Coefficients."""
    fields = ()
    for field in tl.static_range(count):
        fields += (tl.load(table + row * count + field),)  # type: ignore[assignment]
    return fields


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
def _load_scales(scales, index, end):
    """The scale of each element, of blocks of 128."""
    return tl.load(scales.to(tl.pointer_type(tl.float32)) + index // 128, mask=index < end, other=0)


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
    """float32 `x` as codes, int8 of a moment or uint8 of a variance, and the scales of its blocks of 128; as
    formats.blocks.encode_state."""
    count: tl.constexpr = index.shape[0] // 128
    moment: tl.constexpr = pointer.dtype.element_ty == tl.int8
    limit: tl.constexpr = 127.0 if moment else 255.0
    coded = tl.abs(x) if moment else tl.sqrt_rn(x)
    largest = tl.max(tl.reshape(coded.to(tl.uint32, bitcast=True), [count, 128]), axis=1)
    scale = tl.div_rn(
        largest.to(tl.float32, bitcast=True), tl.full([count], limit * limit if moment else limit, tl.float32)
    )
    scale = tl.where((largest != 0) & (scale < 1.1754943508222875e-38), 1.1754943508222875e-38, scale)
    scale = tl.where(largest >= 0x7F800000, float("nan"), scale)
    inverse = tl.where(scale > 0, tl.div_rn(tl.full([count], 1.0, tl.float32), scale), 0.0)
    scaled = coded * tl.reshape(tl.broadcast_to(inverse[:, None], [count, 128]), [count * 128])
    root = tl.sqrt_rn(scaled) if moment else scaled
    nearest = (root + 12582912.0) - 12582912.0
    code = tl.where(nearest < limit, nearest, limit).to(tl.int32)
    code = tl.where(x < 0, -code, code) if moment else tl.where((code == 0) & (coded > 0), 1, code)
    _store_bits(pointer, index, end, code.to(pointer.dtype.element_ty), aligned)
    block = start // 128 + tl.arange(0, count)
    tl.store(scales.to(tl.pointer_type(tl.float32)) + block, scale, mask=block * 128 < end)


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


@_jit
def _span(numel, first_chunk, addresses, chunk_size: tl.constexpr, block: tl.constexpr):
    """The elements of this program's chunk: begin..middle for the aligned path, middle..end for the general path."""
    begin = (tl.program_id(0) - first_chunk) * chunk_size
    end = tl.minimum(begin + chunk_size, numel)
    whole_blocks = (end - begin) // block * block
    middle = begin + tl.where(addresses % 16 == 0, whole_blocks, 0)
    return begin, middle, end


@_jit
def _update(
    addresses,
    c,
    random,
    begin,
    end,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    master: tl.constexpr,
    param_at_random: tl.constexpr,
    state_at_random: tl.constexpr,
    block: tl.constexpr,
    aligned: tl.constexpr,
):
    """The elements begin..end, line by line as in reference.drift_adamw_:

    g          = grad_coef*grad [- delta_coef*delta]
    exp_avg    = beta1*exp_avg + one_minus_beta1*g
    exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*(g*g)
    param      = param*decay [+ delta_step*delta] - step_size*(exp_avg/(sqrt(exp_avg_sq)*inv_sqrt_bc2 + eps))
    """
    grad_coef, delta_coef, delta_step, decay, beta1, one_minus_beta1 = c[:6]
    beta2, one_minus_beta2, step_size, inv_sqrt_bc2, eps, step = c[6:]
    param_pointer = _pointer(addresses[0], param_dtype, aligned)
    grad_pointer = _pointer(addresses[1], grad_dtype, aligned)
    exp_avg_pointer = _pointer(addresses[2], state_dtype, aligned)
    exp_avg_sq_pointer = _pointer(addresses[3], tl.uint8 if state_dtype == tl.int8 else state_dtype, aligned)
    if delta_dtype is not None:
        delta_pointer = _pointer(addresses[4], delta_dtype, aligned)
    if master:
        residual_pointer = _pointer(addresses[5], tl.int16, aligned)
    exp_avg_scale, exp_avg_sq_scale, delta_scale = addresses[6:]

    for start in range(begin, end, block):
        i = start + tl.arange(0, block)
        if master:
            high, low = _load_bits(param_pointer, i, end, aligned), _load_bits(residual_pointer, i, end, aligned)
            param = ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            param = _load(param_pointer, i, end, aligned)
        grad = _load(grad_pointer, i, end, aligned)
        exp_avg = _load_state(exp_avg_pointer, exp_avg_scale, i, end, aligned)
        exp_avg_sq = _load_state(exp_avg_sq_pointer, exp_avg_sq_scale, i, end, aligned)

        g = grad_coef * grad
        param = param * decay
        if delta_dtype is not None:
            delta = _load_delta(delta_pointer, delta_scale, i, end, aligned)
            g = g - delta_coef * delta
            param = param + delta_step * delta
        exp_avg = beta1 * exp_avg + one_minus_beta1 * g
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g)
        param = param - step_size * tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) * inv_sqrt_bc2 + eps)

        if master:
            bits = tl.where(param != param, 0x7FC00000, param.to(tl.uint32, bitcast=True))
            _store_bits(param_pointer, i, end, ((bits + 0x8000) >> 16).to(tl.uint16), aligned)
            _store_bits(residual_pointer, i, end, bits.to(tl.uint16).to(tl.int16, bitcast=True), aligned)
        else:
            bits = _draw(random, step.to(tl.uint32), 0, start, block) if param_at_random else None
            _store(param_pointer, i, end, param, bits, aligned)
        if state_dtype == tl.int8:
            _store_codes(exp_avg_pointer, exp_avg_scale, start, i, end, exp_avg, aligned)
            _store_codes(exp_avg_sq_pointer, exp_avg_sq_scale, start, i, end, exp_avg_sq, aligned)
        else:
            bits = _draw(random, step.to(tl.uint32), 1, start, block) if state_at_random else None
            _store(exp_avg_pointer, i, end, exp_avg, bits, aligned)
            bits = _draw(random, step.to(tl.uint32), 2, start, block) if state_at_random else None
            _store(exp_avg_sq_pointer, i, end, exp_avg_sq, bits, aligned)


@_jit
def _update_chunk(
    table,
    grads,
    chunk_tensor,
    coefficients,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    master: tl.constexpr,
    param_at_random: tl.constexpr,
    state_at_random: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    tensor = tl.load(chunk_tensor + tl.program_id(0)).to(tl.int64)
    row = _fields(table, tensor, 14)
    param, residual, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, delta, delta_scale = row[:8]
    numel, first_chunk = row[8:10]
    grad = tl.load(grads + tensor)
    c = _fields(coefficients, tensor, 12)
    if c[11] == 0:  # the step is not taken
        return
    together = param | grad | exp_avg | exp_avg_sq
    if delta_dtype is not None:
        together |= delta
    if master:
        together |= residual
    begin, middle, end = _span(numel, first_chunk, together, chunk_size, block)
    addresses = (param, grad, exp_avg, exp_avg_sq, delta, residual, exp_avg_scale, exp_avg_sq_scale, delta_scale)
    _update(
        *(addresses, c, row[10:], begin, middle, param_dtype, grad_dtype, state_dtype, delta_dtype),
        *(master, param_at_random, state_at_random, block, True),
    )
    _update(
        *(addresses, c, row[10:], middle, end, param_dtype, grad_dtype, state_dtype, delta_dtype),
        *(master, param_at_random, state_at_random, block // 2, False),
    )


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
    delta, delta_scale, numel, first_chunk = _fields(table, tensor, 14)[6:10]
    grad = tl.load(grads + tensor)
    together = grad
    if delta_dtype is not None:
        together |= delta
    begin, middle, end = _span(numel, first_chunk, together, chunk_size, block)
    tensors = (grad, delta, delta_scale)
    grad_grad, grad_delta = _sums(*tensors, begin, middle, grad_dtype, delta_dtype, block, True)
    more_grad_grad, more_grad_delta = _sums(*tensors, middle, end, grad_dtype, delta_dtype, block // 2, False)
    tl.store(partials + chunk * 2, grad_grad + more_grad_grad)
    tl.store(partials + chunk * 2 + 1, grad_delta + more_grad_delta)


@_jit
def _sum_tensor(table, partials, out, chunk_size: tl.constexpr, block: tl.constexpr):
    """The second stage: the sums of one tensor, over its chunks in a fixed order."""
    tensor = tl.program_id(0).to(tl.int64)
    numel, first_chunk = _fields(table, tensor, 14)[8:10]
    chunks = (numel + chunk_size - 1) // chunk_size
    pair = tl.arange(0, 2)
    sums = tl.zeros([block, 2], tl.float64)
    for start in range(0, chunks, block):
        chunk = (start + tl.arange(0, block))[:, None]
        sums += tl.load(partials + (first_chunk + chunk) * 2 + pair, mask=chunk < chunks, other=0)
    tl.store(out + tensor * 2 + pair, tl.sum(sums, axis=0))
