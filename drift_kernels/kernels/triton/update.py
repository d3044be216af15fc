"""The kernel of the update."""

# mypy: allow-untyped-defs

from __future__ import annotations

from .access import _fields, _load, _load_bits, _span, _store, _store_upper, _upper
from .codes import _load_delta, _load_state, _store_codes
from .jit import _jit, missing
from .layout import (
    BETA1,
    BETA2,
    COEFFICIENTS,
    DECAY,
    DELTA,
    DELTA_COEF,
    DELTA_SCALE,
    DELTA_STEP,
    EPS,
    EXP_AVG,
    EXP_AVG_SCALE,
    EXP_AVG_SQ,
    EXP_AVG_SQ_SCALE,
    EXP_AVG_SQ_STREAM,
    EXP_AVG_STREAM,
    FIRST_CHUNK,
    GRAD_COEF,
    INV_SQRT_BC2,
    NUMEL,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    ORIGIN,
    PARAM,
    PARAM_STREAM,
    PITCH,
    RANDOM_KEY,
    RESIDUAL,
    ROW,
    STEP,
    STEP_SIZE,
    WIDTH,
)
from .random import _draw, _whole_index

if missing is None:
    import triton.language as tl


@_jit
def _update(
    table,
    tensor,
    grad_address,
    c,
    begin,
    end,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    delta_dtype: tl.constexpr,
    master: tl.constexpr,
    param_at_random: tl.constexpr,
    state_at_random: tl.constexpr,
    converts: tl.constexpr,
    lines: tl.constexpr,
    aligned: tl.constexpr,
):
    """Update the elements begin..end, with the operations of reference.drift_adamw_:

    g          = grad_coef*grad [- delta_coef*delta]
    exp_avg    = beta1*exp_avg + one_minus_beta1*g
    exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*(g*g)
    param      = param*decay [+ delta_step*delta] - step_size*(exp_avg/(sqrt(exp_avg_sq)*inv_sqrt_bc2 + eps))
    """
    variance_dtype: tl.constexpr = tl.uint8 if state_dtype == tl.int8 else state_dtype
    step = c[STEP].to(tl.uint32)
    row = _fields(table, tensor, ROW)
    for start in range(begin, end, lines * 8):
        if state_dtype == tl.int8 or master or param_at_random or state_at_random:
            row = _fields(table, tensor, ROW)  # reloaded, so that addresses occupy no registers between iterations
        if master:
            high = _upper(_load_bits(row[PARAM], param_dtype, start, end, lines, aligned), lines, aligned)
            low = _upper(_load_bits(row[RESIDUAL], tl.int16, start, end, lines, aligned), lines, aligned)
            param = (high.to(tl.int32, bitcast=True) + (low.to(tl.int32, bitcast=True) >> 16)).to(
                tl.float32, bitcast=True
            )
        else:
            param = _load(row[PARAM], param_dtype, start, end, lines, aligned)
        grad = _load(grad_address, grad_dtype, start, end, lines, aligned)
        exp_avg = _load_state(row[EXP_AVG], row[EXP_AVG_SCALE], state_dtype, start, end, lines, aligned)
        exp_avg_sq = _load_state(row[EXP_AVG_SQ], row[EXP_AVG_SQ_SCALE], variance_dtype, start, end, lines, aligned)

        g = c[GRAD_COEF] * grad
        param = param * c[DECAY]
        if delta_dtype is not None:
            delta = _load_delta(row[DELTA], row[DELTA_SCALE], delta_dtype, start, end, lines, aligned)
            g = g - c[DELTA_COEF] * delta
            param = param + c[DELTA_STEP] * delta
        exp_avg = c[BETA1] * exp_avg + c[ONE_MINUS_BETA1] * g
        exp_avg_sq = c[BETA2] * exp_avg_sq + c[ONE_MINUS_BETA2] * (g * g)
        divisor = tl.sqrt_rn(exp_avg_sq) * c[INV_SQRT_BC2] + c[EPS]
        param = param - c[STEP_SIZE] * tl.div_rn(exp_avg, divisor)

        if param_at_random or state_at_random:
            index = _whole_index(row, start, lines, aligned)
        if master:
            bits = tl.where(param != param, 0x7FC00000, param.to(tl.uint32, bitcast=True))
            _store_upper(row[PARAM], start, end, bits + 0x8000, lines, aligned)
            _store_upper(row[RESIDUAL], start, end, bits << 16, lines, aligned)
        else:
            bits = _draw(index, row[RANDOM_KEY], step, PARAM_STREAM, lines, aligned) if param_at_random else None
            _store(row[PARAM], param_dtype, start, end, param, bits, lines, aligned, converts)
        if state_dtype == tl.int8:
            _store_codes(row[EXP_AVG], row[EXP_AVG_SCALE], tl.int8, start, end, exp_avg, lines, aligned)
            _store_codes(row[EXP_AVG_SQ], row[EXP_AVG_SQ_SCALE], tl.uint8, start, end, exp_avg_sq, lines, aligned)
        else:
            bits = _draw(index, row[RANDOM_KEY], step, EXP_AVG_STREAM, lines, aligned) if state_at_random else None
            _store(row[EXP_AVG], state_dtype, start, end, exp_avg, bits, lines, aligned, converts)
            bits = _draw(index, row[RANDOM_KEY], step, EXP_AVG_SQ_STREAM, lines, aligned) if state_at_random else None
            _store(row[EXP_AVG_SQ], state_dtype, start, end, exp_avg_sq, bits, lines, aligned, converts)


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
    converts: tl.constexpr,
    chunk_size: tl.constexpr,
    lines: tl.constexpr,
):
    tensor = tl.load(chunk_tensor + tl.program_id(0)).to(tl.int64)
    row = _fields(table, tensor, ROW)
    grad = tl.load(grads + tensor)
    c = _fields(coefficients, tensor, COEFFICIENTS)
    if c[STEP] == 0:  # the step is not taken
        return
    together = row[PARAM] | grad | row[EXP_AVG] | row[EXP_AVG_SQ]
    if delta_dtype is not None:
        together |= row[DELTA]
    if master:
        together |= row[RESIDUAL]
    if param_at_random or state_at_random:
        # On the aligned path a line must be a block of eight of the whole tensor. Doubled, multiples of 8 pass the
        # test for multiples of 16.
        together |= (row[ORIGIN] | row[WIDTH] | row[PITCH]) * 2
    begin, middle, end = _span(row[NUMEL], row[FIRST_CHUNK], together, chunk_size, lines * 8)
    _update(
        *(table, tensor, grad, c, begin, middle, param_dtype, grad_dtype, state_dtype, delta_dtype),
        *(master, param_at_random, state_at_random, converts, lines, True),
    )
    _update(
        *(table, tensor, grad, c, middle, end, param_dtype, grad_dtype, state_dtype, delta_dtype),
        *(master, param_at_random, state_at_random, converts, lines // 4, False),
    )
