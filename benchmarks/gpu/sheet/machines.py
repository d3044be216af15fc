"""Every constant of the model, with its source, or "assumed"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# "GUIDE": CUDA C++ Programming Guide, the tables of arithmetic throughput and of compute capabilities.


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        clock: in GHz. NVIDIA's data sheets give the boost clock; that of an H100 is one under load, assumed.
        terabytes: of memory bandwidth a second, by the data sheets of the SXM parts.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    terabytes: float

    @property
    def of_a_copy(self) -> float:
        """Terabytes that a copy moves in a second."""
        return COPY_SHARE * self.terabytes

    @property
    def copied(self) -> float:
        """Bytes that a copy moves in a cycle, of one multiprocessor."""
        return self.of_a_copy * 1e3 / (self.multiprocessors * self.clock)

    def cycles(self, nanoseconds: float) -> float:
        return nanoseconds * self.clock


MACHINES = [
    Machine("A100", "sm_80", 108, 1.41, 2.04),
    Machine("H100", "sm_90", 132, 1.755, 3.35),
    Machine("H200", "sm_90", 132, 1.98, 4.8),
    Machine("B200", "sm_100", 148, 1.965, 8.0),
]
ARCHITECTURES = list(dict.fromkeys(machine.arch for machine in MACHINES))

COPY_SHARE = 0.92  # of the peak that a copy reaches: assumed
LATENCIES = (800, 1400)  # ns until a load has come while memory is busy: assumed, a low and a high one

# What a multiprocessor holds: GUIDE. Each quarter of it has its own scheduler and its own registers, which warps get in
# units of 256; the system takes 1 KB of shared memory for each block.
WARPS, BLOCKS, QUARTERS = 64, 32, 4
REGISTERS, REGISTER_UNIT = 16384, 256
SHARED_KB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}

# Cycles from one instruction of a pipe to the next, in one quarter: 32 threads over its lanes. GUIDE: 16 lanes of most
# pipes, 32 of FP32 (16 on sm_80), 4 of XU. CTRL, UNI, LDC, CVT and FP32x2 are assumed.
INTERVALS = {
    "FP32": 1, "FP32x2": 2, "HALF": 1, "IMAD": 2, "ALU": 2, "CVT": 2, "XU": 8, "LSU": 2, "FP64": 2, "UNI": 2, "LDC": 2,
    "CTRL": 1,
}  # fmt: skip
INTERVALS_OF = {"sm_80": {"FP32": 2, "HALF": 2}}
UNITS = {"FP32x2": "FP32", "HALF": "FP32"}  # what runs in the place of another pipe: assumed
UNITS_OF = {"sm_80": {"IMAD": "FP32"}}

# Cycles, all assumed: of the order that published microbenchmarks of Volta to Hopper give.
PROLOGUE = 1200  # from a block's begin to its first turn: the row, the coefficients, the first addresses
TAKEN_BRANCH = 8
RESULTS = {"XU": 20, "LDC": 30}  # until a result is there, of instructions that set a barrier
SHARED_RESULT, OTHER_RESULT = 30, 15
OPERANDS_READ = 15  # until a store's or a load's operands may change
BARRIER = 20  # of a block, beyond the wait for its last warp
L1_BYTES = 64  # that pass between registers and global memory in a cycle

# How much the times of service vary: 0 is not at all, 1 as if at random. Assumed, between the two; of the values tried
# it agrees best with a simulation of one multiprocessor (benchmarks/README.md). What is not named here does not vary.
VARIES = {"memory": 0.5}


def intervals(arch: str) -> dict[str, int]:
    return {**INTERVALS, **INTERVALS_OF.get(arch, {})}


def units(arch: str) -> dict[str, str]:
    """Where each pipe's instructions run."""
    return {pipe: {**UNITS, **UNITS_OF.get(arch, {})}.get(pipe, pipe) for pipe in INTERVALS}


def constants() -> dict[str, Any]:
    """All of them, for the JSON file."""
    machines = {machine.name: {**vars(machine), "copied": round(machine.copied, 3)} for machine in MACHINES}
    values = {name.lower(): value for name, value in globals().items() if name.isupper() and name != "MACHINES"}
    return {"machines": machines, **values}
