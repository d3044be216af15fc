"""The triton backend: one launch per primitive for all tensors of a plan, whose addresses it reads from a table.

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

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..plan import CHUNK, Plan, dtype_name

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    _reason = f"Triton cannot be imported ({error})"

CAPTURABLE = False  # new gradient addresses take a copy from the host

# Eight elements a thread: 16 bytes of each bfloat16 tensor, 32 of each float32 one, requested before the first is used.
UPDATE_BLOCK = 1024
# Sixteen elements a thread, since only two tensors are read. A float32 lane adds up CHUNK / (STATS_BLOCK / 2) = 16
# products at most, so the error is within 16 * 2^-24 = 9.5e-7 (of sum(g*g); of norm(g)*norm(delta) for sum(g*delta)).
STATS_BLOCK = 2048
# The chunks whose sums the second stage reads at once.
TOTAL_BLOCK = 512

# No contraction: every operation is rounded by itself. (And no autotuning: each trial would update the tensors.)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _jit(function):
    """`triton.jit` that specialises on no argument; without Triton the function itself, which nobody will launch."""
    if triton is None:
        return function
    arguments = [name for name in inspect.signature(function).parameters if name not in function.__annotations__]
    return triton.jit(function, do_not_specialize=arguments)


@_jit
def _fields(table, row, count: tl.constexpr):
    """A row as a tuple: the 8 fields of plan.ROW_FIELDS, or the 12 of coefficients.Coefficients."""
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
    return x.to(tl.float32)


@_jit
def _draw(key, step, stream: tl.constexpr, start, block: tl.constexpr):
    """16 random bits for each of the elements start .. start + block, as lossless.random_bits has them; start is a
    multiple of 8."""
    calls = start // 8 + tl.arange(0, block // 8)
    x0 = calls.to(tl.uint32)
    x1 = (calls >> 32).to(tl.uint32) | (stream << 30)
    x2 = tl.zeros_like(x0) + step
    x3 = tl.zeros_like(x0)
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        a, b = tl.umulhi(x0, 0xD2511F53), tl.umulhi(x2, 0xCD9E8D57)
        low_a, low_b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = b ^ x1 ^ key0, low_b, a ^ x3 ^ key1, low_a
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    words = tl.permute(tl.join(tl.join(x0, x1), tl.join(x2, x3)), 0, 2, 1)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [block])


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
    random_key,
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
    exp_avg_sq_pointer = _pointer(addresses[3], state_dtype, aligned)
    if delta_dtype is not None:
        delta_pointer = _pointer(addresses[4], delta_dtype, aligned)
    if master:
        residual_pointer = _pointer(addresses[5], tl.int16, aligned)

    for start in range(begin, end, block):
        i = start + tl.arange(0, block)
        if master:
            high, low = _load_bits(param_pointer, i, end, aligned), _load_bits(residual_pointer, i, end, aligned)
            param = ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            param = _load(param_pointer, i, end, aligned)
        grad = _load(grad_pointer, i, end, aligned)
        exp_avg = _load(exp_avg_pointer, i, end, aligned)
        exp_avg_sq = _load(exp_avg_sq_pointer, i, end, aligned)

        g = grad_coef * grad
        param = param * decay
        if delta_dtype is not None:
            delta = _load(delta_pointer, i, end, aligned)
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
            random = _draw(random_key, step.to(tl.uint32), 0, start, block) if param_at_random else None
            _store(param_pointer, i, end, param, random, aligned)
        random = _draw(random_key, step.to(tl.uint32), 1, start, block) if state_at_random else None
        _store(exp_avg_pointer, i, end, exp_avg, random, aligned)
        random = _draw(random_key, step.to(tl.uint32), 2, start, block) if state_at_random else None
        _store(exp_avg_sq_pointer, i, end, exp_avg_sq, random, aligned)


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
    param, residual, exp_avg, exp_avg_sq, delta, numel, first_chunk, key = _fields(table, tensor, 8)
    grad = tl.load(grads + tensor)
    c = _fields(coefficients, tensor, 12)
    together = param | grad | exp_avg | exp_avg_sq
    if delta_dtype is not None:
        together |= delta
    if master:
        together |= residual
    begin, middle, end = _span(numel, first_chunk, together, chunk_size, block)
    addresses = (param, grad, exp_avg, exp_avg_sq, delta, residual)
    _update(
        *(addresses, c, key, begin, middle, param_dtype, grad_dtype, state_dtype, delta_dtype),
        *(master, param_at_random, state_at_random, block, True),
    )
    _update(
        *(addresses, c, key, middle, end, param_dtype, grad_dtype, state_dtype, delta_dtype),
        *(master, param_at_random, state_at_random, block // 2, False),
    )


@_jit
def _sums(
    grad,
    delta,
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
            grad_delta += g * _load(delta_pointer, i, end, aligned)
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
    _, _, _, _, delta, numel, first_chunk, _ = _fields(table, tensor, 8)
    grad = tl.load(grads + tensor)
    together = grad
    if delta_dtype is not None:
        together |= delta
    begin, middle, end = _span(numel, first_chunk, together, chunk_size, block)
    grad_grad, grad_delta = _sums(grad, delta, begin, middle, grad_dtype, delta_dtype, block, True)
    more_grad_grad, more_grad_delta = _sums(grad, delta, middle, end, grad_dtype, delta_dtype, block // 2, False)
    tl.store(partials + chunk * 2, grad_grad + more_grad_grad)
    tl.store(partials + chunk * 2 + 1, grad_delta + more_grad_delta)


@_jit
def _sum_tensor(table, partials, out, chunk_size: tl.constexpr, block: tl.constexpr):
    """The second stage: the sums of one tensor, over its chunks in a fixed order."""
    tensor = tl.program_id(0).to(tl.int64)
    _, _, _, _, _, numel, first_chunk, _ = _fields(table, tensor, 8)
    chunks = (numel + chunk_size - 1) // chunk_size
    pair = tl.arange(0, 2)
    sums = tl.zeros([block, 2], tl.float64)
    for start in range(0, chunks, block):
        chunk = (start + tl.arange(0, block))[:, None]
        sums += tl.load(partials + (first_chunk + chunk) * 2 + pair, mask=chunk < chunks, other=0)
    tl.store(out + tensor * 2 + pair, tl.sum(sums, axis=0))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def unavailable(device: torch.device) -> str | None:
    if triton is None:
        return _reason
    # TRITON_INTERPRET counts where `triton.jit` is called; for Triton's own functions, when Triton is imported.
    compiled = [isinstance(function, triton.JITFunction) for function in (tl.sum, _update_chunk)]
    if device.type == "cpu":
        wanting = "it runs on CPU tensors in Triton's interpreter alone: set TRITON_INTERPRET=1 before the first import"
        return wanting if any(compiled) else None
    if device.type not in ("cuda", "xpu"):
        return f"Triton does not compile for {device.type}"
    if not all(compiled):
        return f"TRITON_INTERPRET is set, and the interpreter does not reach the memory of {device.type}"
    try:
        with _on(device):
            target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no driver, no C compiler, no Python headers: the message says which
        return f"Triton cannot launch ({error!r})"
    return unsuitable(target.arch) if target.backend == "cuda" else None


def unsuitable(arch: int) -> str | None:
    """Why NVIDIA's architecture `arch` (90 for sm_90) will not do."""
    if arch < 80:
        return f"Triton needs compute capability 8.0, not {arch // 10}.{arch % 10}"
    if arch >= 100 and triton.__version__.startswith("3.6."):
        # Its ptxas (12.9) makes one FFMA of mul.rn.f32x2 and add.rn.f32x2, whatever --fmad says.
        return "Triton 3.6 contracts multiplications and additions on Blackwell: install another version"
    return None


def _dtypes(plan: Plan, with_delta: bool) -> list[Any]:
    """The dtypes of a plan, which have the same names in Triton."""
    delta = plan.delta_dtype if with_delta else None
    dtypes = (plan.param_dtype, plan.grad_dtype, plan.state_dtype, delta)
    return [dtype and getattr(tl, dtype_name(dtype)) for dtype in dtypes]


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    _, grad_dtype, _, delta_dtype = _dtypes(plan, with_delta)
    table, partials = plan.device_table, plan.partials
    with _on(plan.device):
        if plan.chunk_count:
            sum_chunk = _sum_chunk[(plan.chunk_count,)]
            addresses = table, plan.device_grad_table, plan.chunk_tensor
            sum_chunk(*addresses, partials, grad_dtype, delta_dtype, CHUNK, STATS_BLOCK, **OPTIONS)
        _sum_tensor[(len(plan),)](table, partials, out, CHUNK, TOTAL_BLOCK, **OPTIONS)


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    addresses, dtypes = (plan.device_table, plan.device_grad_table, plan.chunk_tensor), _dtypes(plan, with_delta)
    if plan.chunk_count:
        with _on(plan.device):
            kinds = plan.dtype_names(with_delta)
            modes = (kinds[0].startswith("master"), *(kind.startswith("stochastic") for kind in (kinds[0], kinds[2])))
            update_chunk = _update_chunk[(plan.chunk_count,)]
            update_chunk(*addresses, coefficients, *dtypes, *modes, CHUNK, UPDATE_BLOCK, **OPTIONS)
