"""The launches of the triton backend: one per primitive for all tensors of a plan, given a table of addresses."""

# mypy: allow-untyped-defs

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..operands import dtype_name
from ..plan import CHUNK, Plan
from .bias import _bias_chunk
from .jit import missing
from .sums import _sum_chunk, _sum_tensor
from .update import _update_chunk

if missing is None:
    import triton
    import triton.language as tl

CAPTURABLE = False  # new gradient addresses need a copy from the host
READS_TENSORS = False
FILLS_COEFFICIENTS = False

THREADS = 128  # per block, for any warp size
# Lines of a tile: one per thread, of eight elements.
LINES = THREADS
# The number of chunks whose sums the second stage reads at once.
TOTAL_BLOCK = 1024


@cache
def _target(device: torch.device) -> tuple[str, int]:
    """Return Triton's backend ("interpreter", "cuda", "hip", ...) and the warp size, which is 64 on AMD's CDNA."""
    if device.type == "cpu":
        return "interpreter", 32
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


def _converts(device: torch.device) -> bool:
    """Whether kernels round to bfloat16 with the device's instruction: NVIDIA's turns every NaN into 0x7fff."""
    return _target(device)[0] == "cuda"


def _options(device: torch.device, registers: int | None = None) -> dict[str, Any]:
    """Launch options. No contraction, because every operation is rounded separately. No autotuning, because each trial
    would update the tensors. `registers`: the maximum per thread, which only CUDA's compiler supports."""
    compiler, warp_size = _target(device)
    limit = {"maxnreg": registers} if registers and compiler == "cuda" else {}
    return {"num_warps": THREADS // warp_size, "enable_fp_fusion": False, **limit}


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, because Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def unavailable(device: torch.device) -> str | None:
    if missing is not None:
        return missing
    # TRITON_INTERPRET is read when `triton.jit` is called; for Triton's own functions, when Triton is imported.
    compiled = [isinstance(function, triton.JITFunction) for function in (tl.sum, _update_chunk)]
    if device.type == "cpu":
        wanting = "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the first import"
        return wanting if any(compiled) else None
    if device.type not in ("cuda", "xpu"):
        return f"Triton does not compile for {device.type}"
    if not all(compiled):
        return f"TRITON_INTERPRET is set, but the interpreter cannot access {device.type} memory: unset it"
    try:
        with _on(device):
            target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no driver, no C compiler, no Python headers: the message says which
        return f"Triton cannot launch ({error!r})"
    return unsuitable(target.arch) if target.backend == "cuda" else None


def unsuitable(arch: int) -> str | None:
    """Why NVIDIA's architecture `arch` (90 for sm_90) is not supported; None if it is."""
    if arch < 80:
        return f"Triton needs compute capability 8.0 or higher, got {arch // 10}.{arch % 10}"
    if arch >= 100 and triton.__version__.startswith("3.6."):
        # Its ptxas (12.9) contracts mul.rn.f32x2 and add.rn.f32x2 to one FFMA, regardless of --fmad.
        return "Triton 3.6 contracts multiplications and additions on Blackwell: install another version"
    return None


def _dtypes(plan: Plan, with_delta: bool) -> list[Any]:
    """The Triton dtypes of a plan, which have the same names as torch's; float8 is read as raw bits."""
    dtypes = plan.dtypes if with_delta else plan.dtypes._replace(delta=None)
    names = [dtype and dtype_name(dtype) for dtype in dtypes]
    return [name and getattr(tl, "uint8" if name == "float8_e4m3fn" else name) for name in names]


def _tables(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    return plan.device_table, plan.device_grad_table, plan.chunk_tensor


def grad_stats(plan: Plan, out: Tensor, *, with_delta: bool) -> None:
    _, grad_dtype, _, delta_dtype = _dtypes(plan, with_delta)
    table, grads, chunk_tensor = _tables(plan)
    # Tiles requested at once, while as many others are used: at least 64 bytes per thread in total.
    read = grad_dtype.primitive_bitwidth + (delta_dtype.primitive_bitwidth if delta_dtype else 0)
    tiles = 2 if read >= 32 else 4
    with _on(plan.device):
        if plan.chunk_count:
            _sum_chunk[(plan.chunk_count,)](
                *(table, grads, chunk_tensor, plan.partials, grad_dtype, delta_dtype),
                *(CHUNK, LINES, tiles),
                **_options(plan.device),
            )
        _sum_tensor[(len(plan),)](table, plan.partials, out, CHUNK, TOTAL_BLOCK, **_options(plan.device))


def update(plan: Plan, coefficients: Tensor, *, with_delta: bool) -> None:
    dtypes = _dtypes(plan, with_delta)
    param, _, state, _ = (str(kind) for kind in plan.dtype_names(with_delta))
    modes = param.startswith("master"), param.startswith("stochastic"), state.startswith("stochastic")
    # Per thread. Without a limit, the compiler uses more, which lowers the occupancy.
    registers = 80 if state == "int8" or modes[0] else 72 if any(modes) else None
    if plan.chunk_count:
        with _on(plan.device):
            _update_chunk[(plan.chunk_count,)](
                *(*_tables(plan), coefficients, *dtypes, *modes, _converts(plan.device), CHUNK, LINES),
                **_options(plan.device, registers),
            )


def bias(plan: Plan, coefficients: Tensor) -> None:
    _, grad_dtype, _, delta_dtype = _dtypes(plan, True)
    if plan.chunk_count:
        with _on(plan.device):
            _bias_chunk[(plan.chunk_count,)](
                *(*_tables(plan), coefficients, grad_dtype, delta_dtype, _converts(plan.device), CHUNK, LINES),
                **_options(plan.device),
            )
