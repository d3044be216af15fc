"""The check that runs before every measurement: each backend must agree with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels.kernels.scalings import SCALINGS

from .contender import drift_optimizer
from .modes import Mode
from .problem import Problem
from .shapes import NamedShape

SHAPES: list[NamedShape] = [
    (f"layers.{layer}.mlp.up_proj.weight", shape)
    for layer, shape in enumerate([(1,), (63,), (1000,), (7, 131), (0,), (33, 131), (16385,)])
]
STEPS = 3

# Relative to a tensor's largest element, for coefficients from sums over gradients, on which backends agree to 1e-6.
TOLERANCE = 2e-6


class ParityError(AssertionError):
    """A backend does not agree with the reference."""


def check_parity(backend: str, device: torch.device, dtype: torch.dtype, mode: Mode) -> None:
    """Step a backend and the reference side by side on small tensors, some of them large enough for codes.

    With the same coefficients (without a prior, and under absolute and decoupled scaling), params and all states must
    be bitwise identical. Under gradnorm and adaptive_cosine, each computes coefficients from its own sums; there, the
    biased gradients, averaged in a float32 exp_avg, must agree to TOLERANCE.

    Raises:
        ParityError: if they do not agree; the message tells where.
    """
    for scaling in (None, *(name for name, scaling in SCALINGS.items() if not scaling.needs_stats)):
        problem = Problem.random(SHAPES, ["all"], dtype, device)
        for where, tensors in _side_by_side(problem, backend, scaling, mode):
            for key, (ours, reference) in tensors.items():
                if not torch.equal(_bits(ours), _bits(reference)):
                    raise ParityError(f"{where}: {key} differs from the reference's")
    for scaling in (name for name, scaling in SCALINGS.items() if scaling.needs_stats):
        problem = Problem.random(SHAPES, ["all"], dtype, device)
        for where, tensors in _side_by_side(problem, backend, scaling, replace(mode, states=torch.float32)):
            ours, reference = tensors["exp_avg"]
            bound = TOLERANCE * float(reference.abs().max()) if reference.numel() else 0.0
            if ((ours - reference).abs() > bound).any():
                raise ParityError(f"{where}: exp_avg differs from the reference's by more than {bound:.3g}")


def _side_by_side(
    problem: Problem, backend: str, scaling: str | None, mode: Mode
) -> Iterator[tuple[str, dict[str, tuple[Tensor, Tensor]]]]:
    """Yield, after each step and for each parameter, its description and the pairs (backend's, reference's) of the
    param and all its states."""
    params = problem.own_params(), problem.own_params()
    checked = drift_optimizer(problem, params[0], backend, scaling, mode)
    reference = drift_optimizer(problem, params[1], "reference", scaling, mode)
    for step in range(1, STEPS + 1):
        checked.step()
        reference.step()
        for own, right in zip(*params, strict=True):
            where = (
                f"backend {backend!r}, {problem.dtype}, {mode.label}, scaling {scaling or 'none'}, "
                f"shape {tuple(own.shape)}, step {step}"
            )
            states = {key: (checked.state[own][key], state) for key, state in reference.state[right].items()}
            yield where, {"param": (own, right), **states}


def _bits(x: Tensor) -> Tensor:
    """The bits of a tensor, as integers of the same width."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])
