"""Predicts from a kernel's machine code which share of a copy's bandwidth it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from drift_kernels.kernels.plan import CHUNK

from . import banks, machines
from .kinds import Traffic
from .machines import Machine
from .paths import WIDE, Path
from .queues import Station, rounds
from .walk import WARP, Costs, Phase, servers, walk

NEAR = 0.97  # share of a copy from which a kernel counts as memory-bound


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for an architecture.

    Attributes:
        traffic: per element.
        path: a turn of its wide loop.
        registers: per thread.
        shared: bytes of shared memory per block.
        threads: per block.
    """

    name: str
    arch: str
    traffic: Traffic
    path: Path
    registers: int
    shared: int
    threads: int

    @property
    def elements(self) -> float:
        """Elements per turn of a thread. A fraction means that the loop was misidentified."""
        return self.path.wide_bytes / self.traffic.values

    @property
    def warps(self) -> int:
        """Warps per block."""
        return -(-self.threads // WARP)

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor."""
        unit = machines.REGISTER_UNIT
        of_a_warp = -(-self.registers * WARP // unit) * unit
        return min(
            machines.BLOCKS,
            machines.WARPS // self.warps,
            machines.QUARTERS * (machines.REGISTERS // of_a_warp) // self.warps,
            machines.SHARED_KB[self.arch] * 1024 // (self.shared + 1024),
        )

    @property
    def turns(self) -> int:
        """Turns per block."""
        return max(1, round(CHUNK / (self.threads * self.elements)))

    @cached_property
    def costs(self) -> Costs:
        """The costs of the path's steps. Narrow accesses of a wide turn are those of scales, which threads share."""
        streams = set(map(id, self.path.streams))
        narrow = sum(step.width for step in self.path.streams if step.width < WIDE)
        part = min(1.0, self.elements * self.traffic.scales / narrow) if narrow else 0.0
        moved = [
            0.0 if id(step) not in streams else step.width if step.width >= WIDE else part * step.width
            for step in self.path.steps
        ]
        return Costs(moved, self._shared[0])

    @cached_property
    def _shared(self) -> tuple[list[int], bool]:
        return banks.shared_cycles(self.path)

    def remarks(self) -> list[str]:
        """Remarks on what the model does not cover."""
        unknown = sorted({step.opcode for step in self.path.steps if not step.pipe})
        found = {
            f"{self.elements:.2f} elements per turn: does not match the bytes of its dtypes": self.elements % 1 != 0,
            f"counted as ALU: {' '.join(unknown)}": unknown,
            f"calls: {self.path.calls}, their instructions are not counted": self.path.calls,
            f"inner loops: {self.path.inner_loops}, each counted as one turn": self.path.inner_loops,
            "not all addresses of shared memory could be followed": not self._shared[1],
        }
        return [remark for remark, applies in found.items() if applies]


@dataclass(frozen=True)
class Prediction:
    """The prediction for a kernel on a machine, at one memory latency.

    Attributes:
        share: of a copy's bandwidth.
        ceilings: the share that each part alone would allow: the pipes by name, "issue", "L1", and "latency" (or
            "barriers"), the limit of this many warps that do not delay each other.
        in_flight: the most bytes in flight per multiprocessor.
    """

    share: float
    ceilings: dict[str, float]
    in_flight: float

    @property
    def bound(self) -> str:
        """What limits the kernel first."""
        return "memory" if self.share >= NEAR else min(self.ceilings, key=lambda part: self.ceilings[part])


def predict(kernel: Kernel, machine: Machine, nanoseconds: float) -> Prediction:
    """Predict the speed in the middle of a long launch, relative to a copy at `machines.COPY_SHARE`."""
    alone = walk(kernel.path, kernel.costs, machine, machine.cycles(nanoseconds))
    turn = Phase.all(alone.phases)
    memory = turn.busy["memory"]
    ceilings = {part: servers(part) * memory / time for part, time in turn.busy.items() if time and part != "memory"}
    if len(alone.phases) == 1:
        cycles, rate = _warps(kernel, turn)
        ceilings["latency"] = memory * kernel.warps * kernel.blocks / cycles
    else:
        cycles, rate = _blocks(kernel, turn, alone.phases)
        ceilings["barriers"] = memory * kernel.warps * kernel.blocks / cycles
    return Prediction(min(1.0, rate * memory), ceilings, alone.in_flight * kernel.threads * kernel.blocks)


def _warps(kernel: Kernel, turn: Phase) -> tuple[float, float]:
    """The cycles of an undelayed warp's turn, and the turns per cycle of all warps together."""
    cycles = turn.cycles + machines.PROLOGUE / kernel.turns
    quarter = turn.quarter()
    stations = [
        Station(quarter, machines.QUARTERS),
        Station(turn.busy["L1"]),
        Station(turn.busy["memory"], varies=machines.VARIES["memory"]),
    ]
    return cycles, rounds(kernel.warps * kernel.blocks, cycles - quarter, stations)


def _blocks(kernel: Kernel, turn: Phase, phases: list[Phase]) -> tuple[float, float]:
    """The same for warps that wait for each other, with a block's turn. Between two barriers the first warp takes its
    time, and the busiest part then serves the other warps; blocks compete for the busiest part of the whole turn.
    """

    def others(phase: Phase) -> float:
        return max((kernel.warps / servers(part) - 1) * time for part, time in phase.busy.items())

    cycles = machines.PROLOGUE / kernel.turns + sum(phase.cycles + others(phase) for phase in phases)
    busiest = max(kernel.warps / servers(part) * time for part, time in turn.busy.items())
    return cycles, kernel.warps * rounds(kernel.blocks, max(0.0, cycles - busiest), [Station(busiest)])
