"""Compiles the Triton backend's launches for GPUs that need not be present.

    PYTHONPATH=. python tests/sass.py ARCH [FOLDER]

prints JSON: one object per kernel, compiled for sm_ARCH, or AMD's gfxARCH. NVIDIA's cubins are written to the folder,
for `python -m benchmarks.gpu.sheet --cubins FOLDER`.

It is a separate program because `triton.jit` returns compilable kernels only if TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import contraction
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from benchmarks.gpu import disassembly
from drift_kernels.kernels.coefficients import Coefficients
from drift_kernels.kernels.operands import Operands
from drift_kernels.kernels.plan import Plan
from drift_kernels.kernels.triton import backend

# param, grad, states, delta; whether there is a master, and whether rounding is stochastic
LAUNCHES = [
    (("bfloat16", "bfloat16", "float32", "bfloat16"), False, False),
    (("bfloat16", "bfloat16", "bfloat16", "bfloat16"), False, False),
    (("float32", "float32", "float32", None), False, False),
    (("float16", "float16", "float32", "bfloat16"), False, False),
    (("bfloat16", "bfloat16", "bfloat16", "bfloat16"), False, True),
    (("bfloat16", "bfloat16", "float32", "bfloat16"), True, False),
    (("bfloat16", "bfloat16", "bfloat16", None), True, True),
    (("bfloat16", "float32", "bfloat16", "float32"), True, True),
    (("bfloat16", "float32", "float32", "bfloat16"), False, True),
    (("bfloat16", "bfloat16", "int8", "int8"), False, True),
    (("bfloat16", "bfloat16", "int8", "float8_e4m3fn"), True, False),
]


def launches(target: GPUTarget) -> dict[str, tuple[ASTSource, dict[str, Any]]]:
    """The kernels that the primitives launch, as sources, and the options of their launches."""
    backend._target = lambda device: (target.backend, target.warp_size)
    found: dict[str, tuple[ASTSource, dict[str, Any]]] = {}

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        values = inspect.signature(kernel.fn).bind(*args).arguments
        constants = {param.name: values[param.name] for param in kernel.params if param.is_constexpr}
        signature = {name: "constexpr" if name in constants else mangle_type(value) for name, value in values.items()}
        dtypes = [str(value) for name, value in constants.items() if name.endswith("dtype")]
        modes = [name for name in ("master", "param_at_random", "state_at_random") if constants.get(name)]
        found[" ".join([kernel.__name__, *dtypes, *modes])] = ASTSource(kernel, signature, constants), options

    JITFunction.run = record
    for dtypes, master, stochastic in LAUNCHES:
        param, grad, state, delta = (name and torch.zeros(1, dtype=getattr(torch, name)) for name in dtypes)
        residual = torch.zeros(1, dtype=torch.int16) if master else None
        scale = torch.zeros(1)
        key = 0 if stochastic else None
        operands = Operands(param, state, state, delta, residual, scale, scale, scale, key)
        plan = Plan([operands], grad.dtype)
        plan.set_grads([grad])
        backend.grad_stats(plan, torch.empty(1, 2, dtype=torch.float64), with_delta=True)
        coefficients = torch.empty(1, len(Coefficients._fields))
        backend.update(plan, coefficients, with_delta=True)
        if plan.has_deltas:
            backend.bias(plan, coefficients)
    return found


def compiled(target: GPUTarget, name: str, source: ASTSource, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    binary = triton.compile(source, target=target, options=options)
    path = folder / f"{name}.sm_{target.arch}.cubin"
    path.write_bytes(binary.asm["cubin"])
    (facts,) = disassembly.kernels(path).values()
    return {
        **facts,
        "threads": 32 * options["num_warps"],
        "specialized": [p.name for p in source.fn.params if not p.is_constexpr and not p.do_not_specialize],
        "ptx": contraction.operations(binary.asm["ptx"]),
        "halves": Counter(re.findall(r"\b(?:cvt\.\w+\.bf16(?:x2)?\.f32|\w+\.s16(?:x2)?)\b", binary.asm["ptx"])),
    }


def compiled_for_amd(target: GPUTarget, source: ASTSource, options: dict[str, Any]) -> dict[str, Any]:
    """Compile for a CDNA GPU, whose warps have 64 threads: the machine code's instructions, and its memory use."""
    code = triton.compile(source, target=target, options=options).asm["amdgcn"]
    usage = {
        key: int(value)
        for key, value in re.findall(
            r"^\s+\.(vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", code, re.MULTILINE
        )
    }
    lines = re.findall(r"^\t([a-z]\w+)( [^;\n]*)?", code, re.MULTILINE)
    return {
        "usage": usage,
        "opcodes": Counter(re.sub(r"_e(?:32|64)$", "", opcode) for opcode, _ in lines),
        "mixed": [operands for opcode, operands in lines if opcode.startswith("v_fma_mix")],
    }


if __name__ == "__main__":
    chosen = sys.argv[1]
    of_amd = chosen.startswith("gfx")
    target = GPUTarget("hip", chosen, 64) if of_amd else GPUTarget("cuda", int(chosen), 32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[2] if len(sys.argv) > 2 else temporary)
        folder.mkdir(exist_ok=True)
        made = {
            name: compiled_for_amd(target, source, options)
            if of_amd
            else compiled(target, name, source, options, folder)
            for name, (source, options) in launches(target).items()
        }
    json.dump(made, sys.stdout)
