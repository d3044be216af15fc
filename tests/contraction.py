"""Checks that compiled kernels round every operation separately: the arithmetic in their PTX and machine code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu.disassembly import run

# Floating-point arithmetic in PTX; a packed operation counts as two.
PTX_ARITHMETIC = r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt)(?:\.\w+)*\.{}(?:x2)?\b"


def operations(ptx: str, kind: str = "f32") -> Counter[str]:
    """The count of each arithmetic operation in PTX, for float32 or "f64"."""
    return Counter(re.findall(PTX_ARITHMETIC.format(kind), ptx))


def arithmetic(path: Path, kind: str = "f32") -> dict[str, Counter[str]]:
    """For each kernel in an extension, the count of each operation in its PTX."""
    entries = re.split(r"\.entry (\w+)\(", run("-ptx", path))[1:]
    return {name: operations(body, kind) for name, body in zip(entries[::2], entries[1::2], strict=True)}


def scalars(counts: Mapping[str, int], *opcodes: str) -> int:
    """The number of scalar operations; a packed one counts as two."""
    return sum(counts.get(opcode, 0) * (2 if opcode.endswith(("x2", "L2", "D2")) else 1) for opcode in opcodes)


# The first instruction of the project's own divisions and square roots.
APPROXIMATE = ("rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32")


def assert_nothing_was_contracted(name: str, sass: Mapping[str, int], ptx: Mapping[str, int], fused: int = 0) -> None:
    """Check that the PTX has as many fma as the source, and the machine code every multiplication and addition of the
    PTX.

    (It has more FFMAs: divisions and square roots become sequences of them, whose FMULs and FADDs are all .FTZ. On
    sm_100 some FADDs are moves.)
    """
    assert scalars(ptx, "fma.rn.f32", "fma.rn.f32x2") == fused, name
    assert all(".rn.f32" in operation or (fused and operation in APPROXIMATE) for operation in ptx), name
    additions = scalars(ptx, "add.rn.f32", "add.rn.f32x2", "sub.rn.f32", "sub.rn.f32x2")
    assert scalars(sass, "FADD", "FADD2") >= additions, name
    assert scalars(sass, "FMUL", "FMUL2") == scalars(ptx, "mul.rn.f32", "mul.rn.f32x2"), name
