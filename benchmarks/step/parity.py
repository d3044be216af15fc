"""A fast backend that is wrong is not fast: the check that runs before every measurement."""

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

# Of a tensor's largest element, where coefficients come from sums over the gradients: backends agree on those to 1e-6.
TOLERANCE = 2e-6


class ParityError(AssertionError):
    """A backend does not agree with the reference."""


def check_parity(backend: str, device: torch.device, dtype: torch.dtype, mode: Mode) -> None:
    """Steps a backend and the reference side by side on small tensors, some of them large enough for codes.

    Given the same coefficients (without a prior, and under absolute and decoupled scaling), params and all
    states must agree bit for bit. Under gradnorm and adaptive_cosine each has coefficients from its own sums: there the
    biased gradients, of which a float32 exp_avg is the mean, must agree to TOLERANCE.

    Raises:
        ParityError: they do not; says where.
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
    """After each step, by parameter: where this is, and its param and all its states, the backend's beside the
    reference's."""
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
    """The bits of a tensor, as integers of its width."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])
