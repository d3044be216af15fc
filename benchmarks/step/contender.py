"""Contenders: the optimizer steps that are timed. Ours are here, their rivals in `peers.py` and the modules beside
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from drift_kernels import FusedDriftAdamW
from drift_kernels.prior.deltas import tensors_of

from .modes import Mode
from .problem import ADAMW, ALPHA, MAX_GRAD_NORM, Problem

# The backends that can run on each type of device; each is a contender with the same name.
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# These move the bytes and compute nothing; the others are compared with them.
LIMITS = ("copy", "streams")

# Enough for a copy to reach its steady rate on any GPU; more would take memory from the contenders.
MAX_COPY_BYTES = 2**32


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """An optimizer step to time.

    Attributes:
        name: as in `--contenders`.
        label: for tables and plots.
        scaling: the prior's scaling; None for a step without a prior.
        state_dtype: of exp_avg and exp_avg_sq.
        bytes: the bytes that the step cannot avoid moving (`Problem.bytes_to_move`).
        step: the function that is timed.
        optimizer: owns the parameters and states.
        prepare: runs before each step, untimed, and restores what a step overwrites.
        clip: whether the step clips the gradients to MAX_GRAD_NORM.
        deltas: the deltas that it keeps; for a small prior, codes and scales.
        mode: the mode, for ours.
    """

    name: str
    label: str
    scaling: str | None
    state_dtype: torch.dtype | None
    bytes: int
    step: Callable[[], object] = field(repr=False)
    optimizer: Optimizer | None = field(default=None, repr=False)
    prepare: Callable[[], object] = field(default=nothing, repr=False)
    clip: bool = False
    deltas: Sequence[Tensor] = field(default=(), repr=False)
    mode: Mode | None = None

    @property
    def ours(self) -> bool:
        return is_ours(self.name)


def is_ours(name: str) -> bool:
    return any(name in names for names in BACKENDS.values())


def drift(problem: Problem, backend: str, scaling: str | None, mode: Mode, clip: bool = False) -> Contender:
    """FusedDriftAdamW on one backend, in one mode.

    Raises BackendUnavailableError if the backend cannot run on the problem's device.
    """
    params = problem.own_params()
    optimizer = drift_optimizer(problem, params, backend, scaling, mode, clip)
    bytes_to_move = problem.bytes_to_move(scaling, mode.storage(problem.dtype), clip)
    deltas = [] if scaling is None else _delta_tensors(problem, mode)
    return Contender(
        backend,
        f"drift {backend}",
        scaling,
        mode.states,
        bytes_to_move,
        optimizer.step,
        optimizer,
        clip=clip,
        deltas=deltas,
        mode=mode,
    )


def _delta_tensors(problem: Problem, mode: Mode) -> list[Tensor]:
    """The tensors that a mode's prior keeps on the device."""
    if mode.prior_on_host:
        return []
    prior = problem.loaded_prior(mode.prior)
    stored = [prior.load_stored(name, problem.device, copy=False) for name in prior.names]
    return [tensor for delta in stored for tensor in tensors_of(delta)]


def drift_optimizer(
    problem: Problem,
    params: list[Tensor],
    backend: str,
    scaling: str | None,
    mode: Mode,
    clip: bool = False,
) -> FusedDriftAdamW:
    """FusedDriftAdamW for these parameters, with the problem's prior unless `scaling` is None."""
    options: dict[str, Any] = {**mode.options, "max_grad_norm": MAX_GRAD_NORM if clip else None}
    if scaling is not None:
        options |= {"prior": problem.loaded_prior(mode.prior), "prior_scaling": scaling, "alpha": ALPHA}
        options["prior_device"] = mode.prior_device
    named = list(zip(problem.names, params, strict=True))
    return FusedDriftAdamW(named, **ADAMW, **options, backend=backend)


def copy_bytes(numel: int, dtype: torch.dtype) -> int:
    """The bytes that torch's fused AdamW must move, with its states in the dtype of the parameters."""
    return min(7 * dtype.itemsize * numel, MAX_COPY_BYTES)


def copy(problem: Problem) -> Contender:
    """A copy that moves as many bytes as a step of torch's fused AdamW: the memory bandwidth available now."""
    size = copy_bytes(problem.numel, problem.dtype) // 2
    source = torch.ones(size, dtype=torch.uint8, device=problem.device)
    target = torch.zeros_like(source)
    return Contender("copy", "copy", None, None, 2 * size, lambda: target.copy_(source))
