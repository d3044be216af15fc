"""Every constant of the model, with its source or marked as assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# "GUIDE": CUDA C++ Programming Guide, the tables of arithmetic throughput and of compute capabilities.


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        clock: in GHz: the boost clock of NVIDIA's data sheets; for an H100 the clock under load, assumed.
        terabytes: memory bandwidth in TB per second, from the data sheets of the SXM parts.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    terabytes: float

    @property
    def of_a_copy(self) -> float:
        """Terabytes that a copy moves per second."""
        return COPY_SHARE * self.terabytes

    @property
    def copied(self) -> float:
        """Bytes that a copy moves per cycle and multiprocessor."""
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

COPY_SHARE = 0.92  # a copy's bandwidth as a share of the peak: assumed
LATENCIES = (800, 1400)  # ns until a load returns while memory is busy, low and high: assumed

# Limits of a multiprocessor: GUIDE. Each quarter has its own scheduler and its own registers, allocated to warps in
# units of 256; the system takes 1 KB of shared memory per block.
WARPS, BLOCKS, QUARTERS = 64, 32, 4
REGISTERS, REGISTER_UNIT = 16384, 256
SHARED_KB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}

# Cycles from one instruction of a pipe to the next in one quarter: 32 threads divided by its lanes. GUIDE: most pipes
# have 16 lanes, FP32 32 (16 on sm_80), XU 4. CTRL, UNI, LDC, CVT and FP32x2 are assumed.
INTERVALS = {
    "FP32": 1, "FP32x2": 2, "HALF": 1, "IMAD": 2, "ALU": 2, "CVT": 2, "XU": 8, "LSU": 2, "FP64": 2, "UNI": 2, "LDC": 2,
    "CTRL": 1,
}  # fmt: skip
INTERVALS_OF = {"sm_80": {"FP32": 2, "HALF": 2}}
UNITS = {"FP32x2": "FP32", "HALF": "FP32"}  # run on another pipe's unit: assumed
UNITS_OF = {"sm_80": {"IMAD": "FP32"}}

# Cycles, all assumed, of the order of published microbenchmarks for Volta to Hopper.
PROLOGUE = 1200  # from a block's start to its first turn: the row, the coefficients, the first addresses
TAKEN_BRANCH = 8
RESULTS = {"XU": 20, "LDC": 30}  # until the result of an instruction that sets a barrier
SHARED_RESULT, OTHER_RESULT = 30, 15
OPERANDS_READ = 15  # until the operands of a load or store may be overwritten
BARRIER = 20  # of a block, in addition to waiting for its last warp
L1_BYTES = 64  # per cycle, between registers and global memory

# How much the service times vary, from 0 (constant) to 1 (random). Assumed, between the two; of the values tried, this
# one agrees best with a simulation of one multiprocessor (benchmarks/README.md). Times not listed here do not vary.
VARIES = {"memory": 0.5}


def intervals(arch: str) -> dict[str, int]:
    return {**INTERVALS, **INTERVALS_OF.get(arch, {})}


def units(arch: str) -> dict[str, str]:
    """The unit on which each pipe's instructions run."""
    return {pipe: {**UNITS, **UNITS_OF.get(arch, {})}.get(pipe, pipe) for pipe in INTERVALS}


def constants() -> dict[str, Any]:
    """All constants, for the JSON file."""
    machines = {machine.name: {**vars(machine), "copied": round(machine.copied, 3)} for machine in MACHINES}
    values = {name.lower(): value for name, value in globals().items() if name.isupper() and name != "MACHINES"}
    return {"machines": machines, **values}
