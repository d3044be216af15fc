"""What a warp executes in one turn of a kernel's wide loop: the loop, and the path through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .opcodes import Instruction

WIDE = 8  # bytes of an access in a wide turn; smaller ones are of single elements or scales

Edges = list[list[int]]
Worth = tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """One turn.

    Attributes:
        steps: its instructions, in the order that a warp executes them.
        taken: whether each is a taken branch.
        before: the code before the loop.
        streams: the steps that access memory that no other turn accesses.
        inner_loops: the number of loops in it; each counts as one iteration.
    """

    steps: list[Instruction]
    taken: list[bool]
    before: list[Instruction]
    streams: list[Instruction]
    inner_loops: int

    @property
    def calls(self) -> int:
        """The number of calls; the called instructions are not counted."""
        return sum(step.is_call for step in self.steps)

    @property
    def wide_bytes(self) -> int:
        return sum(step.width for step in self.streams if step.width >= WIDE)

    def pipes(self) -> Counter[str]:
        return Counter(step.pipe or "ALU" for step in self.steps)


def wide_path(code: list[Instruction]) -> Path | None:
    """The path through the loop that moves the most bytes in wide accesses, among loops that contain no other such
    loop.

    It is the path with the fewest calls, then the most wide bytes, the most stores, the fewest instructions. So it
    takes neither slow paths, which are calls or longer, nor the code for single elements.
    """
    edges = successors(code)
    live = reach(0, edges)
    bodies = loops(edges, live)
    hints = any(step.is_streamed for step in code)

    def streaming(body: Iterable[int]) -> set[int]:
        """The streaming accesses: ours all have a cache hint; in a kernel without hints, those whose addresses
        change."""
        accesses = [k for k in body if code[k].is_load or code[k].is_store]
        if hints:
            return {k for k in accesses if code[k].is_streamed}
        moved = {register for k in body for register in code[k].results}
        return {k for k in accesses if code[k].address_register in moved}

    streams = {head: streaming(body) for head, body in bodies.items()}
    wide = {head: {k for k in found if code[k].width >= WIDE} for head, found in streams.items()}
    found = []
    for head, body in bodies.items():
        inner = [other for other in bodies if other != head and other in body]
        if not wide[head] or any(wide[other] for other in inner):
            continue
        best, steps = best_path(code, edges, head, body, wide[head])
        crossed = set(steps)
        inside = sum(other in crossed for other in inner)
        found.append((best, steps, [code[k] for k in steps if k in streams[head]], head, inside))
    if not found:
        return None
    _, steps, streamed, head, inside = max(found, key=lambda one: (one[0][1], one[0][0], one[0][2:]))
    taken = [after != k + 1 for k, after in zip(steps, [*steps[1:], head], strict=True)]
    return Path([code[k] for k in steps], taken, code[:head], streamed, inside)


def successors(code: list[Instruction]) -> Edges:
    """For each instruction, those that may execute next. Calls return."""
    index = {step.address: k for k, step in enumerate(code)}
    edges: Edges = []
    for k, step in enumerate(code):
        after = [k + 1] if k + 1 < len(code) else []
        target = index.get(step.target) if step.target is not None and step.name != "CALL" else None
        if step.name in ("EXIT", "RET", "KILL") and not step.guard:
            after = []
        elif target is not None and ".DIV" not in step.opcode:  # .DIV: diverged warps
            after = [target] if step.always_branches else [*after, target]
        edges.append(after)
    return edges


def reach(start: int, edges: Edges, without: int = -1) -> set[int]:
    seen, todo = {start}, [start]
    while todo:
        for k in edges[todo.pop()]:
            if k != without and k not in seen:
                seen.add(k)
                todo.append(k)
    return seen


def ordered(start: int, edges: Edges, within: set[int]) -> tuple[list[int], set[tuple[int, int]]]:
    """The instructions in topological order without back edges, and the back edges."""
    order: list[int] = []
    done: set[int] = set()
    open_: dict[int, None] = {start: None}
    back: set[tuple[int, int]] = set()
    stack = [(start, iter(edges[start]))]
    while stack:
        k, rest = stack[-1]
        for after in rest:
            if after in open_:
                back.add((k, after))
            elif after in within and after not in done:
                open_[after] = None
                stack.append((after, iter(edges[after])))
                break
        else:
            stack.pop()
            del open_[k]
            done.add(k)
            order.append(k)
    return order[::-1], back


def loops(edges: Edges, live: set[int]) -> dict[int, set[int]]:
    """For the first instruction of each loop, all instructions that lead back to it."""
    reverse: Edges = [[] for _ in edges]
    for k in live:
        for after in edges[k]:
            reverse[after].append(k)
    bodies: dict[int, set[int]] = {}
    for last, head in ordered(0, edges, live)[1]:
        body = {head} if last == head else {head, *reach(last, reverse, without=head)} & live
        bodies[head] = bodies.get(head, set()) | body
    return bodies


def best_path(
    code: list[Instruction], edges: Edges, head: int, body: set[int], wide: set[int]
) -> tuple[Worth, list[int]]:
    """The best path from the loop's first instruction to one that leads back to it, with its worth."""

    def worth(k: int) -> Worth:
        step = code[k]
        return -step.is_call, step.width if k in wide else 0, int(step.is_store), -1

    order, back = ordered(head, edges, body)
    best: dict[int, tuple[Worth, int]] = {head: (worth(head), -1)}
    for k in order:
        for after in edges[k]:
            if after in body and (k, after) not in back:
                total = tuple(a + b for a, b in zip(best[k][0], worth(after), strict=True))
                if after not in best or total > best[after][0]:
                    best[after] = (total, k)
    last = max((k for k in order if head in edges[k]), key=lambda k: best[k][0])
    steps = [last]
    while steps[-1] != head:
        steps.append(best[steps[-1]][1])
    return best[last][0], steps[::-1]
