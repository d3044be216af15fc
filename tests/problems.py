"""Random launches for the tests of the backends, and how their results are compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import grid
import torch
from torch import Tensor

from drift_kernels import backends
from drift_kernels.coefficients import CoefficientTable, Hyperparameters
from drift_kernels.plan import Plan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Beside the package's own: the cuda backend's kernels, run on the host.
GRID = "grid"
sys.modules[f"{backends.__name__}.{GRID}"] = grid


@dataclass
class Problem:
    """Params, gradients, states and deltas; `clone` gives the same values elsewhere."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    deltas: list[Tensor] | None
    residuals: list[Tensor] | None = None
    random_keys: list[int] | None = None

    @classmethod
    def random(
        cls,
        numels: list[int],
        dtypes: tuple[torch.dtype | None, ...],
        master: bool = False,
        stochastic: bool = False,
    ) -> Problem:
        param, grad, state, delta = dtypes
        keys = torch.randint(2**62, (len(numels),)).tolist()

        def tensors(dtype: torch.dtype, scale: float) -> list[Tensor]:
            return [(torch.randn(n, device=DEVICE) * scale).to(dtype) for n in numels]

        return cls(
            tensors(param, 1.0),
            tensors(grad, 0.1),
            tensors(state, 0.01),
            [t.abs() for t in tensors(state, 1e-3)],
            None if delta is None else tensors(delta, 0.05),
            [torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16, device=DEVICE) for n in numels]
            if master
            else None,
            keys if stochastic else None,
        )

    def clone(self) -> Problem:
        return self.each(torch.clone)

    def each(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """With every tensor replaced."""
        lists = {name: tensors for name, tensors in vars(self).items() if name != "random_keys" and tensors is not None}
        return replace(self, **{name: [function(t) for t in tensors] for name, tensors in lists.items()})

    def operands(self) -> list[list[Tensor]]:
        """The tensors, kind by kind."""
        return [tensors for name, tensors in vars(self).items() if name != "random_keys" and tensors is not None]

    def plan(self) -> Plan:
        plan = Plan(
            self.params,
            self.grads[0].dtype,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.deltas,
            self.residuals,
            self.random_keys,
        )
        plan.set_grads(self.grads)
        return plan

    def outputs(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *(self.residuals or [])]


def coefficients(n: int, scaling: str = "decoupled") -> CoefficientTable:
    """A table with other values in every row: the tensors differ in their step count and in their group."""
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
    """Bit for bit; a float32 NaN may be any NaN (its payload is the processor's choice)."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        view = torch.int32 if a.dtype == F32 else torch.int16
        same = a.view(view) == e.view(view)
        if a.dtype == F32:
            same |= a.isnan() & e.isnan()
        if not same.all():
            where = int((~same).flatten().nonzero()[0])
            raise AssertionError(
                f"output {index} of {a.dtype} differs in {int((~same).sum())} of {a.numel()} elements, "
                f"first at {where}: {a.flatten()[where].item()!r} instead of {e.flatten()[where].item()!r}"
            )


def run(name: str, problem: Problem, steps: int, with_delta: bool = True) -> list[Tensor]:
    backend = backends.load(name)
    plan = problem.plan()
    for step in range(steps):
        backend.update(
            plan, coefficients(len(plan), "decoupled" if step % 2 else "absolute").table, with_delta=with_delta
        )
    return problem.outputs()
