"""What cuobjdump says of compiled kernels: opcodes, registers, memory.

python tests/disassembly.py EXTENSION ARCH      prints JSON: one object for each kernel
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# An instruction in a listing: address, predicate, opcode.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# Arithmetic of floats in PTX; a packed operation does two.
PTX_ARITHMETIC = r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt)(?:\.\w+)*\.{}(?:x2)?\b"


def cuobjdump() -> str | None:
    """The program: on PATH, or the one in Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside.exists() else None


def run(*arguments: object) -> str:
    command = [str(cuobjdump()), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernels(path: Path, *options: str) -> dict[str, dict[str, Any]]:
    """For each kernel in a cubin or an extension: how often each opcode occurs ("sass"), and what a thread takes."""
    listing = run("-sass", *options, path)
    usages = {
        name: {key: int(count) for key, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\n(.*)", run("-res-usage", *options, path))
    }
    bodies = re.split(r"^\s+Function : (\S+)$", listing, flags=re.MULTILINE)[1:]
    return {
        name: {"sass": Counter(INSTRUCTION.findall(body)), "usage": usages[name]}
        for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }


def operations(ptx: str, kind: str = "f32") -> Counter[str]:
    """How often PTX has each operation of arithmetic, of float32 or of "f64"."""
    return Counter(re.findall(PTX_ARITHMETIC.format(kind), ptx))


def arithmetic(path: Path, kind: str = "f32") -> dict[str, Counter[str]]:
    """For each kernel in an extension, how often its PTX has which operations."""
    entries = re.split(r"\.entry (\w+)\(", run("-ptx", path))[1:]
    return {name: operations(body, kind) for name, body in zip(entries[::2], entries[1::2], strict=True)}


def scalars(counts: Mapping[str, int], *opcodes: str) -> int:
    """How many operations, of which a packed one does two."""
    return sum(counts.get(opcode, 0) * (2 if opcode.endswith(("x2", "L2", "D2")) else 1) for opcode in opcodes)


# What a division or a root begins with where its code is the project's own: exact results do not depend on them.
APPROXIMATE = ("rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32")


def assert_nothing_was_contracted(name: str, sass: Mapping[str, int], ptx: Mapping[str, int], fused: int = 0) -> None:
    """The PTX has as many fma as its source, and the machine code every multiplication and addition of the PTX.

    (It has more FFMAs: divisions and square roots become sequences of them, whose FMULs and FADDs are all .FTZ. On
    sm_100 some FADDs are moves.)
    """
    assert scalars(ptx, "fma.rn.f32", "fma.rn.f32x2") == fused, name
    assert all(".rn.f32" in operation or (fused and operation in APPROXIMATE) for operation in ptx), name
    additions = scalars(ptx, "add.rn.f32", "add.rn.f32x2", "sub.rn.f32", "sub.rn.f32x2")
    assert scalars(sass, "FADD", "FADD2") >= additions, name
    assert scalars(sass, "FMUL", "FMUL2") == scalars(ptx, "mul.rn.f32", "mul.rn.f32x2"), name


if __name__ == "__main__":
    json.dump(kernels(Path(sys.argv[1]), "-arch", sys.argv[2]), sys.stdout)
