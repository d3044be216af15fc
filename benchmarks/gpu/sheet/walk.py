"""One warp alone: how long a turn takes without delays by other warps, and what it occupies meanwhile."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from . import machines
from .machines import Machine
from .opcodes import NO_BARRIER, Instruction
from .paths import Path

TURNS = 3  # the last one counts: a turn may wait for what the previous one requested
WARP = 32


def servers(part: str) -> int:
    """How many of a part a multiprocessor has: each quarter has its own pipes and issue slots."""
    return 1 if part in ("L1", "memory") else machines.QUARTERS


@dataclass
class Phase:
    """A turn, or the part of it between two barriers.

    Attributes:
        cycles: its duration.
        busy: the cycles for which it keeps each part of the multiprocessor busy: the pipes by name, "issue", "L1",
            "memory". A pipe is busy while it accepts no other instruction.
    """

    cycles: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def all(cls, phases: list[Phase]) -> Phase:
        whole = cls()
        for phase in phases:
            whole.cycles += phase.cycles
            for part, time in phase.busy.items():
                whole.busy[part] += time
        return whole

    def quarter(self) -> float:
        """The cycles of the busiest part that each quarter has."""
        return max(time for part, time in self.busy.items() if servers(part) > 1)


@dataclass
class Walk:
    """The result of `walk`.

    Attributes:
        phases: the phases between the block's barriers; one if there are none.
        in_flight: the most bytes that a thread has requested and not yet received.
    """

    phases: list[Phase]
    in_flight: float


@dataclass(frozen=True)
class Costs:
    """For each step of a path: the bytes that a thread moves to or from memory, and the cycles of shared memory."""

    moved: list[float]
    shared: list[int]


def walk(path: Path, costs: Costs, machine: Machine, latency: float) -> Walk:
    """Execute a path with one warp, in order, according to the control codes.

    An instruction waits for its barriers and its pipe; the next one may follow after `stall` cycles. `latency`: cycles
    until a memory request returns.
    """
    intervals, units = machines.intervals(machine.arch), machines.units(machine.arch)
    now = begun = 0.0
    released = [0.0] * NO_BARRIER
    free: dict[str, float] = defaultdict(float)
    requests: list[tuple[float, float]] = []
    in_flight = 0.0
    for _ in range(TURNS):
        phases = [Phase()]
        for step, taken, moved, shared in zip(path.steps, path.taken, costs.moved, costs.shared, strict=True):
            pipe = step.pipe or "ALU"
            now = max(now, free[units[pipe]], *(released[k] for k in step.awaited))
            free[units[pipe]] = now + intervals[pipe]
            busy = phases[-1].busy
            busy["issue"] += 1
            busy[units[pipe]] += intervals[pipe]
            busy["L1"] += WARP * moved / machines.L1_BYTES + shared
            busy["memory"] += WARP * moved / machine.copied
            if step.is_load and moved:
                requests = [request for request in requests if request[0] > now]
                requests.append((now + latency, moved))
                in_flight = max(in_flight, sum(size for _, size in requests))
            if step.sets != NO_BARRIER:
                result = latency if step.is_load and moved else _result_after(step)
                released[step.sets] = max(released[step.sets], now + result)
            if step.frees != NO_BARRIER:
                released[step.frees] = max(released[step.frees], now + machines.OPERANDS_READ)
            now += max(1, step.stall) + machines.TAKEN_BRANCH * taken
            if step.name == "BAR":
                now += machines.BARRIER
                phases[-1].cycles, begun = now - begun, now
                phases.append(Phase())
        phases[-1].cycles, begun = now - begun, now
    return Walk(phases, in_flight)


def _result_after(step: Instruction) -> int:
    if step.name in ("LDS", "LDG", "LD", "LDL", "SHFL", "LDSM"):
        return machines.SHARED_RESULT
    return machines.RESULTS.get(step.pipe, machines.OTHER_RESULT)
