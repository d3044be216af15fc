"""The two primitives as operators of torch.library, for training code that is functional or compiled as a whole.

Importing this module registers `torch.ops.drift_kernels.update` and `torch.ops.drift_kernels.grad_stats`. A call is one
launch, for n tensors of one device and one combination of dtypes. `FusedDriftAdamW` does not need them.

Codes are followed by their scales in the same list: n tensors of int8, uint8 or float8_e4m3fn, then n of float32, one
scale for each block of 128 elements, of shape [blocks] or `formats.blocks.scale_shape` (`docs/precision.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats.blocks import blocks_of, scale_shape
from .kernels import backends
from .kernels.coefficients import Coefficients
from .kernels.operands import Operands
from .kernels.plan import Plan

CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn)


def _uniform(name: str, tensors: list[Tensor], shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Return the tensors if they have these shapes, one dtype and one device, and are contiguous."""
    if not shapes:
        raise ValueError(f"{name} must have at least one tensor, got none")
    found = [tuple(t.shape) for t in tensors]
    if found != shapes:
        raise ValueError(f"{name} must have shapes {shapes}, got {found}")
    for t in tensors:
        if t.dtype != tensors[0].dtype or t.device != device or not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, of the same dtype and on {device}, got {t.dtype} on {t.device} with "
                f"strides {t.stride()}"
            )
    return tensors


def _expect(name: str, found: torch.dtype, expected: tuple[torch.dtype, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{name} must be {' or '.join(map(str, expected))}, got {found}")


def _with_scales(name: str, tensors: list[Tensor], like: list[Tensor]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Pair each tensor with its scale; None where there is none."""
    n, device = len(like), like[0].device
    values, scales = tensors[:n], tensors[n:]
    if not tensors:
        return [(None, None)] * n
    _uniform(name, values, [tuple(t.shape) for t in like], device)
    if values[0].dtype not in CODES:
        if scales:
            raise ValueError(f"{name} must have {n} tensors if they are {values[0].dtype}, got {len(tensors)}")
        return [(value, None) for value in values]
    # In the shape of FusedDriftAdamW's states, or flat.
    shapes = [scale_shape(tuple(t.shape)) for t in like]
    if [tuple(scale.shape) for scale in scales] != shapes:
        shapes = [(blocks_of(t.numel()),) for t in like]
    _uniform(f"the scales of {name}", scales, shapes, device)
    _expect(f"the scales of {name}", scales[0].dtype, (torch.float32,))
    return list(zip(values, scales, strict=True))


@torch.library.custom_op("drift_kernels::update", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "residuals"))
def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    deltas: list[Tensor],
    residuals: list[Tensor],
    random_keys: list[int],
    coefficients: Tensor,
) -> None:
    """Step n tensors in place, with the backend of their device ("auto"). `docs/numerics.md` has the formula.

    Args:
        params: n, at least one, float32, bfloat16 or float16.
        grads: n of params' shapes, of their dtype or float32.
        exp_avgs: n of params' shapes, float32 or bfloat16; or int8 codes and their scales.
        exp_avg_sqs: likewise, of exp_avgs' dtype; or uint8 codes and their scales beside int8 exp_avgs.
        deltas: n of params' shapes, float32 or bfloat16; or codes of int8 or float8_e4m3fn and their scales; or empty.
        residuals: n of params' shapes, int16, which make bfloat16 params masters; or empty.
        random_keys: n keys of the stochastic rounding (`plan.Operands.random_key`), of whole tensors; or empty.
        coefficients: float32 [n, 12] on params' device, the fields of `coefficients.Coefficients`.

    Raises:
        ValueError: a list has another length, shape, dtype or device, or a tensor is not contiguous.
    """
    n, shapes = len(params), [tuple(p.shape) for p in params]
    device = coefficients.device
    _uniform("params", params, shapes, device)
    _uniform("grads", grads, shapes, device)
    _uniform("exp_avgs", exp_avgs[:n], shapes, device)
    _uniform("exp_avg_sqs", exp_avg_sqs[:n], shapes, device)
    _uniform("coefficients", [coefficients], [(n, len(Coefficients._fields))], device)
    _expect("coefficients", coefficients.dtype, (torch.float32,))
    _expect("params", params[0].dtype, (torch.float32, torch.bfloat16, torch.float16))
    _expect("grads", grads[0].dtype, (params[0].dtype, torch.float32))
    _expect("exp_avgs", exp_avgs[0].dtype, (torch.float32, torch.bfloat16, torch.int8))
    same = torch.uint8 if exp_avgs[0].dtype == torch.int8 else exp_avgs[0].dtype
    _expect("exp_avg_sqs", exp_avg_sqs[0].dtype, (same,))
    if residuals:
        _expect("residuals", residuals[0].dtype, (torch.int16,))
        _expect("params that have residuals", params[0].dtype, (torch.bfloat16,))
    if random_keys and len(random_keys) != n:
        raise ValueError(f"random_keys must have {n} entries or none, got {len(random_keys)}")
    halves = _uniform("residuals", residuals, shapes, device) if residuals else [None] * n
    keys: list[int] | list[None] = random_keys or [None] * n
    moments, variances = (
        _with_scales(name, states, params) for name, states in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs))
    )
    bound = _with_scales("deltas", deltas, params)
    operands = []
    for t, param in enumerate(params):
        (m, m_scale), (v, v_scale), (delta, delta_scale) = moments[t], variances[t], bound[t]
        assert m is not None
        assert v is not None
        operands.append(Operands(param, m, v, delta, halves[t], m_scale, v_scale, delta_scale, keys[t]))
    plan = Plan(operands, grads[0].dtype)
    plan.set_grads(grads)
    backends.resolve("auto", device).update(plan, coefficients, with_delta=True)


@torch.library.custom_op("drift_kernels::grad_stats", mutates_args=())
def grad_stats(grads: list[Tensor], deltas: list[Tensor]) -> Tensor:
    """Return sum(g*g) and sum(g*delta) of each gradient.

    Args:
        grads: n, at least one, float32, bfloat16 or float16.
        deltas: n of grads' shapes, float32 or bfloat16; or codes of int8 or float8_e4m3fn and their scales; or empty.

    Returns:
        float64 [n, 2] on the gradients' device; the second column is 0 without deltas.

    Raises:
        ValueError: a list has another length, shape, dtype or device, or a tensor is not contiguous.
    """
    device = grads[0].device if grads else torch.device("cpu")
    _uniform("grads", grads, [tuple(g.shape) for g in grads], device)
    _expect("grads", grads[0].dtype, (torch.float32, torch.bfloat16, torch.float16))
    bound = _with_scales("deltas", deltas, grads)
    operands = [Operands(g, delta=delta, delta_scale=scale) for g, (delta, scale) in zip(grads, bound, strict=True)]
    plan = Plan(operands, grads[0].dtype)
    plan.set_grads(grads)
    out = torch.empty(len(grads), 2, dtype=torch.float64, device=device)
    backends.resolve("auto", device).grad_stats(plan, out, with_delta=bool(deltas))
    return out


@update.register_fake
def _(*_: object) -> None:
    return None


@grad_stats.register_fake
def _(grads: list[Tensor], deltas: list[Tensor]) -> Tensor:
    return torch.empty(len(grads), 2, dtype=torch.float64, device=grads[0].device)
