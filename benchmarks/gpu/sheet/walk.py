"""One warp by itself: how long a turn takes it where nothing is in its way, and what it occupies meanwhile."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from . import machines
from .machines import Machine
from .opcodes import NO_BARRIER, Instruction
from .paths import Path

TURNS = 3  # of which the last counts: what a turn requests may be waited for in the next
WARP = 32


def servers(part: str) -> int:
    """How many a multiprocessor has of a part: each quarter has its own pipes and issues its own instructions."""
    return 1 if part in ("L1", "memory") else machines.QUARTERS


@dataclass
class Phase:
    """A turn, or what lies between two barriers of it.

    Attributes:
        cycles: that it takes.
        busy: of these the ones for which each part of the multiprocessor works for it: the pipes by name, "issue",
            "L1", "memory". A pipe works for as long as it takes no other instruction.
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
        """Cycles of the busiest of what each quarter has."""
        return max(time for part, time in self.busy.items() if servers(part) > 1)


@dataclass
class Walk:
    """What it shows.

    Attributes:
        phases: which barriers of the block end; one if there are none.
        in_flight: the most bytes that a thread has requested and not yet got.
    """

    phases: list[Phase]
    in_flight: float


@dataclass(frozen=True)
class Costs:
    """Of the steps of a path, one by one: bytes that a thread moves to or from memory, cycles of shared memory."""

    moved: list[float]
    shared: list[int]


def walk(path: Path, costs: Costs, machine: Machine, latency: float) -> Walk:
    """`latency`: cycles until what was requested from memory is there.

    In order, as the control codes say: an instruction waits for barriers and for its pipe, and the next one may follow
    after `stall` cycles.
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
