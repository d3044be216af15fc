"""Shared memory: the cycles that its accesses take, which depend on bank conflicts between a warp's threads.

Follows what the code computes from a thread's index, for the 32 threads of a warp at once. An unknown number that is
the same for all threads counts as 0: it shifts all addresses alike.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from .opcodes import Instruction
from .paths import Path

Lanes = NDArray[np.int64]

BANKS, WORD, THREADS = 32, 4, 32
SHUFFLE = 2  # cycles: assumed
UNIFORM = re.compile(r"-?(?:UR\d+|URZ|RZ|c\[.*\])")
PREDICATE = re.compile(r"!?U?P(?:T|\d)")
ADDRESS = re.compile(r"\[(R\d+)?(?:\.\w+)?\+?(UR\d+)?\+?(-?0x[0-9a-f]+)?\]")


def shared_cycles(path: Path) -> tuple[list[int], bool]:
    """The cycles of one warp for each step, and whether all addresses could be followed. Others count as
    conflict-free."""
    registers: dict[str, Lanes | None] = {}
    cycles: list[int] = []
    followed = True
    for step in [*path.before, *path.steps]:
        taken = SHUFFLE if step.name in ("SHFL", "LDSM", "STSM") else 0
        if step.name in ("LDS", "STS"):
            taken = words = max(1, step.width // WORD)
            found = ADDRESS.search(step.operands)
            base = registers.get(found[1]) if found and found[1] else np.zeros(THREADS, np.int64)
            if base is not None:
                taken = passes(base, words)
            elif len(cycles) >= len(path.before):
                followed = False
        cycles.append(taken)
        value = None if step.guard else computed(step, registers)
        registers.update(dict.fromkeys(step.results))
        if step.results:
            registers[step.results[0]] = value
    return cycles[len(path.before) :], followed


def passes(addresses: Lanes, words: int) -> int:
    """The cycles of an access of this many words per thread. Four words take a quarter warp at a time, two words
    half."""
    total = 0
    for lanes in np.split(addresses // WORD, words):
        touched = np.unique(lanes[:, None] + np.arange(words))
        total += int(np.bincount(touched % BANKS).max())
    return total


def computed(step: Instruction, registers: dict[str, Lanes | None]) -> Lanes | None:
    """The result of an instruction; None if it cannot be followed."""
    if step.name == "S2R":
        return np.arange(THREADS) if "TID.X" in step.operands else np.zeros(THREADS, np.int64)
    texts = [text for text in step.inputs if not PREDICATE.fullmatch(text)]
    values = [value(text, registers) for text in texts]
    if any(one is None for one in values) or not values:
        return None
    known = [one for one in values if one is not None]
    match step.name:
        case "MOV" | "LDC" | "R2UR" | "CS2R":
            return known[-1]
        case "IADD3" | "IADD" | "VIADD" if ".X" not in step.opcode:
            return sum(known[1:], known[0])
        case "IMAD" if ".HI" not in step.opcode and ".X" not in step.opcode and len(known) == 3:
            return known[0] * known[1] + known[2]
        case "LEA" if ".HI" not in step.opcode and len(known) >= 3:
            return (known[0] << known[2]) + known[1]
        case "SHF" if step.opcode.startswith("SHF.L") and ".HI" not in step.opcode:
            return known[0] << known[1]
        case "SHF" if step.opcode.startswith("SHF.R") and ".HI" in step.opcode and len(known) == 3:
            return known[2] >> known[1]
        case "LOP3" if len(known) == 4:
            return logical(known[0], known[1], known[2], int(known[3][0]))
    return None


def value(text: str, registers: dict[str, Lanes | None]) -> Lanes | None:
    if re.fullmatch(r"-?(?:0x[0-9a-f]+|\d+)", text):
        return np.full(THREADS, int(text, 0))
    if UNIFORM.fullmatch(text):
        return np.zeros(THREADS, np.int64)
    found = registers.get(text.lstrip("-"))
    return -found if found is not None and text.startswith("-") else found


def logical(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
    """Apply the truth table to the three inputs, bit by bit."""
    result = np.zeros(THREADS, np.int64)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result
