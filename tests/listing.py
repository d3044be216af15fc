"""A kernel's machine code, written by hand: for the tests of benchmarks.gpu.sheet."""

from __future__ import annotations

import re

from benchmarks.gpu.sheet.kinds import Traffic
from benchmarks.gpu.sheet.machines import MACHINES
from benchmarks.gpu.sheet.model import Kernel
from benchmarks.gpu.sheet.opcodes import parse
from benchmarks.gpu.sheet.paths import Path, wide_path

BF16 = "update<bfloat16, bfloat16, bfloat16, bfloat16>"
H200 = next(machine for machine in MACHINES if machine.name == "H200")


def listing(text: str) -> str:
    """Make a listing in cuobjdump's format from lines "label: instruction {sets 0}": `=label` becomes an address, the
    braces a control code that sets a barrier or waits for one."""
    found = [
        re.fullmatch(r"(?:(\w+): )?(.*?)(?: \{(sets|waits) (\d)\})?", line.strip())
        for line in text.strip().splitlines()
    ]
    places = {one[1]: hex(16 * k) for k, one in enumerate(found) if one[1]}
    lines = []
    for k, one in enumerate(found):
        step = re.sub(r"=(\w+)", lambda label: places[label[1]], one[2])
        sets, waits = (int(one[4]) if one[3] == kind else None for kind in ("sets", "waits"))
        code = 1 | (7 if sets is None else sets) << 5 | 7 << 8 | (0 if waits is None else 1 << waits) << 11
        lines += [f"        /*{16 * k:04x}*/    {step} ;   /* 0x0123456789abcdef */", f"    /* 0x{code << 41:016x} */"]
    return "\n".join(lines)


def turn(text: str) -> Path:
    found = wide_path(parse(listing(text)))
    assert found is not None
    return found


# A turn has two paths, chosen by a warp vote; the slow one is shorter, not counting its call. Then follow single
# elements, and a loop over other memory, which is not streamed.
KERNEL = """
    S2R R0, SR_TID.X
    LDG.E R9, desc[UR4][R8.64]
    head: LDG.E.EF.128 R12, desc[UR4][R2.64] {sets 0}
    LDG.E.EF.128 R16, desc[UR4][R4.64] {sets 0}
    FSETP.GEU.AND P0, PT, R12, R16, PT {waits 0}
    VOTE.ANY P1, P0
    @P1 BRA =slow
    FADD R20, R12, R16
    MUFU.RCP R21, R20
    FMUL R20, R21, R20
    STG.E.EF.128 desc[UR4][R2.64], R20
    next: IADD3 R2, P0, R2, 0x1000, RZ
    IADD3 R4, P0, R4, 0x1000, RZ
    @P0 BRA =head
    BRA =single
    slow: MOV R20, R12
    CALL.REL.NOINC =division
    STG.E.EF.128 desc[UR4][R2.64], R20
    BRA =next
    single: @!P2 LDG.E.EF.U16 R12, desc[UR4][R2.64]
    STG.E.EF.U16 desc[UR4][R2.64], R12
    @P0 BRA =single
    total: LDG.E.64.STRONG.GPU R12, desc[UR4][R6.64]
    LDG.E.64.STRONG.GPU R14, desc[UR4][R6.64+0x1000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x2000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x3000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x4000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x5000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x6000]
    DADD R18, R12, R14
    IADD3 R6, P0, R6, 0x8000, RZ
    @P0 BRA =total
    EXIT
    division: RET.REL.NODEC R36 0x0
"""
FAST = ["LDG", "LDG", "FSETP", "VOTE", "BRA", "FADD", "MUFU", "FMUL", "STG", "IADD3", "IADD3", "BRA"]


def kernel(path: Path, registers: int = 80, shared: int = 0, moved: float = 16) -> Kernel:
    return Kernel(BF16, "sm_90", Traffic(moved, 0), path, registers, shared, 256)
