"""What is timed: one way to do an optimizer step. Ours are here, their rivals in `peers.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from drift_kernels import FusedDriftAdamW

from .problem import ADAMW, ALPHA, Problem

# The backends that can run on each type of device; each is a contender of its own name.
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """A step, and whose it is.

    Attributes:
        name: as in `--contenders`.
        label: for tables and plots.
        scaling: how the prior acts; None for a step without a prior.
        state_dtype: of exp_avg and exp_avg_sq.
        bytes: what the step cannot avoid moving (`Problem.bytes_to_move`).
        optimizer: has its parameters and states.
        step: what is timed.
        prepare: runs before each step, untimed: makes anew what a step overwrites.
    """

    name: str
    label: str
    scaling: str | None
    state_dtype: torch.dtype | None
    bytes: int
    step: Callable[[], object] = field(repr=False)
    optimizer: Optimizer | None = field(default=None, repr=False)
    prepare: Callable[[], object] = field(default=nothing, repr=False)

    @property
    def ours(self) -> bool:
        return any(self.name in names for names in BACKENDS.values())


def drift(problem: Problem, backend: str, scaling: str | None, state_dtype: torch.dtype) -> Contender:
    """FusedDriftAdamW on one backend.

    Raises BackendUnavailableError if the backend cannot run on the problem's device.
    """
    params = problem.own_params()
    optimizer = drift_optimizer(problem, params, backend, scaling, state_dtype)
    bytes_to_move = problem.bytes_to_move(scaling, state_dtype)
    return Contender(backend, f"drift {backend}", scaling, state_dtype, bytes_to_move, optimizer.step, optimizer)


def drift_optimizer(
    problem: Problem, params: list[Tensor], backend: str, scaling: str | None, state_dtype: torch.dtype
) -> FusedDriftAdamW:
    """FusedDriftAdamW for these parameters, with the problem's prior unless `scaling` is None."""
    bias: dict[str, Any] = {}
    if scaling is not None:
        bias = {"prior": problem.prior, "prior_scaling": scaling, "alpha": ALPHA}
    named = list(zip(problem.names, params, strict=True))
    return FusedDriftAdamW(named, **ADAMW, **bias, state_dtype=state_dtype, backend=backend)


def copy(problem: Problem) -> Contender:
    """A copy that moves as many bytes as torch's fused AdamW must: what the memory gives today."""
    bytes_to_move = problem.bytes_to_move(None, problem.dtype)
    source = torch.ones(bytes_to_move // 2, dtype=torch.uint8, device=problem.device)
    target = torch.zeros_like(source)
    return Contender("copy", "copy", None, None, 2 * source.numel(), lambda: target.copy_(source))
