"""Machine code as listed by cuobjdump: instructions, their pipes, and their control codes for the scheduler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

PIPES = {
    "FP32": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I FSWZADD",
    "FP32x2": "FADD2 FMUL2 FFMA2",
    "IMAD": "IMAD",
    "ALU": "LOP3 LOP IADD3 IADD VIADD IADD_32I SHF ISETP SEL FSEL PRMT FSET FSETP FMNMX FMNMX3 LEA PLOP3 IMNMX VIMNMX"
    " VIMNMX3 VIADDMNMX IABS P2R R2P BMSK SGXT MOV MOV32I VABSDIFF ISCADD CS2R VOTE HMNMX2 VHMNMX",
    "CVT": "I2FP F2FP I2IP",
    "HALF": "HADD2 HFMA2 HMUL2 HSETP2",
    "XU": "MUFU FCHK POPC FLO I2F F2I F2F BREV FRND I2I",
    "LSU": "LDG STG LDS STS LDL STL LD ST SHFL LDSM STSM ATOMS ATOMG ATOM RED LDGSTS CCTL",
    "LDC": "LDC",
    "UNI": "R2UR S2UR S2R REDUX CREDUX LDCU ELECT VOTEU",  # and all others that begin with U
    "FP64": "DADD DMUL DFMA DSETP",
    "CTRL": "BRA BSSY BSYNC CALL RET EXIT WARPSYNC BREAK NOP BAR YIELD BRX JMP DEPBAR ERRBAR CGAERRBAR MEMBAR BMOV"
    " KILL",
}  # fmt: skip
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}

# An instruction takes two lines, each with half of its 128 bits.
FIRST = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*(?:/\*.*)?$")
SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
CONTROL = 41  # the control code's lowest bit in the second half

WIDTHS = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
BARRIERS, NO_BARRIER = 6, 7


@dataclass(frozen=True)
class Instruction:
    """An instruction with its control code.

    Attributes:
        guard: the predicate, or "".
        stall: cycles until the warp's next instruction.
        sets: the barrier (of six) that is released when the result is available; 7 means none.
        frees: likewise, when the operands have been read.
        waits: a bit for each barrier that must be released first.
    """

    address: int
    guard: str
    opcode: str
    operands: str
    stall: int = 1
    sets: int = NO_BARRIER
    frees: int = NO_BARRIER
    waits: int = 0

    @cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def pipe(self) -> str:
        """The pipe's name; "" if unknown."""
        return PIPE_OF.get(self.name) or ("UNI" if self.name.startswith("U") else "")

    @cached_property
    def awaited(self) -> list[int]:
        """The barriers in `waits`."""
        return [barrier for barrier in range(BARRIERS) if self.waits >> barrier & 1]

    @property
    def target(self) -> int | None:
        """The target address of a branch or call."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.name in ("BRA", "JMP", "CALL") and found else None

    @property
    def always_branches(self) -> bool:
        """Whether a branch is unconditional. It may have a predicate besides the guard: `@P0 BRA !P1, 0x710`."""
        return not self.guard and self.operands.startswith("0x")

    @property
    def is_call(self) -> bool:
        """Whether it calls a function. Guarded calls occur only where the loop ends, as on sm_80, or on a slow path."""
        return self.name == "CALL" and not self.guard

    @property
    def width(self) -> int:
        """The bytes that a thread accesses."""
        return next((width for suffix, width in WIDTHS.items() if suffix in self.opcode), 4)

    @property
    def is_load(self) -> bool:
        return self.name in ("LDG", "LD", "LDGSTS")

    @property
    def is_store(self) -> bool:
        return self.name in ("STG", "ST")

    @property
    def is_streamed(self) -> bool:
        """Whether its cache hint is to evict first, or not to cache at all."""
        return not {"EF", "NA"}.isdisjoint(self.opcode.split("."))

    @property
    def address_register(self) -> str:
        found = re.search(r"\[(R\d+)", self.operands)
        return found[1] if found else ""

    @cached_property
    def inputs(self) -> list[str]:
        """The operands after the results."""
        return [part.removesuffix(".reuse") for part in self.operands.split(", ")][1:]

    @property
    def results(self) -> list[str]:
        """The registers written."""
        found = re.match(r"(?:U?P\w+, )?(U?R)(\d+)", self.operands)
        if not found or self.is_store or self.name in ("STS", "STL", "RED"):
            return []
        if self.is_load and self.width == 32:  # into two groups of four
            second = self.inputs[0].removeprefix(found[1])
            return [f"{found[1]}{int(first) + k}" for first in (found[2], second) for k in range(4)]
        count = 2 if self.opcode.startswith(("IMAD.WIDE", "CS2R", "D")) else 1
        if self.name in ("LDG", "LD", "LDS", "LDL", "LDC", "ULDC", "LDCU"):
            count = max(1, self.width // 4)
        return [f"{found[1]}{int(found[2]) + k}" for k in range(count)]


def parse(listing: str) -> list[Instruction]:
    """Parse the instructions of one kernel. Without the second lines, the control codes are those of no wait."""
    code: list[Instruction] = []
    first: tuple[int, str, str, str] | None = None
    for line in listing.splitlines():
        if found := FIRST.match(line):
            if first:
                code.append(Instruction(*first))
            first = int(found[1], 16), found[2] or "", found[3], found[4]
        elif first and (found := SECOND.match(line)):
            bits = int(found[1], 16) >> CONTROL
            code.append(Instruction(*first, bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63))
            first = None
    return [*code, Instruction(*first)] if first else code
