"""Random launches for the tests of the backends, and the comparison of their results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grid
import torch
from torch import Tensor

from drift_kernels.formats import blocks
from drift_kernels.formats.philox import Place
from drift_kernels.kernels import backends
from drift_kernels.kernels.coefficients import CoefficientTable, Hyperparameters
from drift_kernels.kernels.operands import Operands
from drift_kernels.kernels.plan import ADDRESSES, Plan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# A backend besides the package's: the cuda backend's kernels, run on the host.
GRID = "grid"
sys.modules[f"{backends.__package__}.{GRID}"] = grid


def with_rare_values(problem: Problem) -> Problem:
    """Set runs of 32 elements to cases that occur in models: never seen (zeros of both signs), not seen for long
    (moments decayed, down to subnormals), and large parameters."""
    for o, grad in zip(problem.operands, problem.grads, strict=True):
        kind = torch.randint(7, (-(-grad.numel() // 32),), device=DEVICE).repeat_interleave(32)[: grad.numel()]
        quiet = [grad, o.exp_avg, o.exp_avg_sq, *([] if o.delta is None else [o.delta])]
        for t in quiet:
            (t.view(torch.uint8) if t.element_size() == 1 else t)[kind == 1] = 0
            if t.dtype in (F32, BF16, F16):
                for which, scale in ((2, 0.0), (3, 2.0**-30), (4, 2.0**-70), (5, 2.0**-130)):
                    t[kind == which] *= scale  # zeros keep the sign
        o.param[kind == 6] *= 50
        o.param[kind == 2] *= 0
    return problem


def some_place(numel: int) -> Place:
    """A possible place of a shard with this many elements in its whole tensor: a range of rows, or of columns."""
    eight, far, odd = (
        8 * int(torch.randint(1, 40, ())),
        8 * int(torch.randint(2**34, ())),
        int(torch.randint(1, 30, ())),
    )
    places = [
        Place(),
        Place(origin=far),
        Place(origin=far + odd),
        Place(far, eight, 3 * eight),
        Place(odd, odd, 2 * odd + 1),
        Place(origin=eight, width=numel + 8 - numel % 8, pitch=far + 2 * numel + 8),
    ]
    return places[int(torch.randint(len(places), ()))]


@dataclass
class Problem:
    """Operands and gradients of several parameters; `clone` copies them."""

    operands: list[Operands]
    grads: list[Tensor]

    @classmethod
    def random(
        cls,
        numels: list[int],
        dtypes: tuple[torch.dtype | None, ...],
        master: bool = False,
        stochastic: bool = False,
    ) -> Problem:
        """A random problem. `dtypes`: of param, grad, states and delta; int8 states and int8 or float8 deltas are
        codes."""
        param, grad, state, delta = dtypes

        def normal(n: int, dtype: torch.dtype, scale: float) -> Tensor:
            return (torch.randn(n, device=DEVICE) * scale).to(dtype)

        def operands(n: int) -> Operands:
            extra: dict[str, Any] = {}
            states = normal(n, F32, 0.01), normal(n, F32, 1e-3).abs()
            if state == torch.int8:
                coded = [
                    blocks.encode_state(*pair) for pair in zip(states, (blocks.MOMENT, blocks.VARIANCE), strict=True)
                ]
                states = coded[0][0], coded[1][0]
                extra |= {"exp_avg_scale": coded[0][1], "exp_avg_sq_scale": coded[1][1]}
            else:
                states = states[0].to(state), states[1].to(state)
            if delta in (torch.int8, torch.float8_e4m3fn):
                bytes_ = torch.randint(-127, 127, (n,), dtype=torch.int8, device=DEVICE)
                bytes_ = torch.where(bytes_ & 0x7F == 0x7F, 0, bytes_)  # no NaN in float8
                scale = torch.rand(blocks.blocks_of(n), device=DEVICE) * 1e-3
                extra |= {"delta": bytes_.view(delta), "delta_scale": scale}
            elif delta is not None:
                extra["delta"] = normal(n, delta, 0.05)
            if master:
                extra["residual"] = torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16, device=DEVICE)
            if stochastic:
                extra["random_key"] = int(torch.randint(2**62, ()))
                extra["place"] = some_place(n)
            return Operands(normal(n, param, 1.0), *states, **extra)

        return cls([operands(n) for n in numels], [normal(n, grad, 0.1) for n in numels])

    def clone(self) -> Problem:
        return self.each(torch.clone)

    def each(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """Apply the function to every tensor."""
        return Problem(
            [replace(o, **{name: function(t) for name, t in tensors_of(o).items()}) for o in self.operands],
            [function(g) for g in self.grads],
        )

    def plan(self) -> Plan:
        plan = Plan(self.operands, self.grads[0].dtype)
        plan.set_grads(self.grads)
        return plan

    def outputs(self) -> list[Tensor]:
        written = {name for name in ADDRESSES if not name.startswith("delta")}
        return [t for o in self.operands for name, t in tensors_of(o).items() if name in written]


def tensors_of(operands: Operands) -> dict[str, Tensor]:
    return {name: t for name in ADDRESSES if (t := getattr(operands, name)) is not None}


def coefficients(n: int, scaling: str = "decoupled") -> CoefficientTable:
    """A table with different values in every row: the tensors differ in step count and group."""
    table = CoefficientTable(DEVICE, torch.arange(n, dtype=F32), [1.0] * n, [1.0] * n)
    for row in range(n):
        h = Hyperparameters(
            10 ** -(1 + row % 4), 0.9 - 0.1 * (row % 3), 0.99, 1e-8, 0.1, row % 2 == 1, 0.7, scaling, False
        )
        table.set_hyperparameters(slice(row, row + 1), h)
    table.advance()
    c = torch.linspace(-1.0, 1.5, n, dtype=torch.float64, device=DEVICE)
    table.set_gradient_coefficients(c, torch.tensor(0.37, dtype=torch.float64, device=DEVICE))
    return table


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Check for bitwise identity; a float32 NaN may be any NaN (the processor chooses its payload)."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        same = a.view(view) == e.view(view)
        if a.dtype == F32:
            same |= a.isnan() & e.isnan()
        if not same.all():
            where = int((~same).flatten().nonzero()[0])
            raise AssertionError(
                f"output {index} of {a.dtype} differs in {int((~same).sum())} of {a.numel()} elements, "
                f"first at {where}: {a.flatten()[where].item()!r} instead of {e.flatten()[where].item()!r}"
            )


@contextmanager
def threads(name: str) -> Iterator[None]:
    """Use several threads for the cpu backend, which divides its work among them; one for the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, os.cpu_count() or 1) if name == "cpu" else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(name: str, problem: Problem, steps: int, with_delta: bool = True) -> list[Tensor]:
    backend = backends.load(name)
    plan = problem.plan()
    for step in range(steps):
        table = coefficients(len(plan), "decoupled" if step % 2 else "absolute").table
        with threads(name):
            backend.update(plan, table, with_delta=with_delta)
    return problem.outputs()
