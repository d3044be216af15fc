"""Uses of the prior outside the optimizer: building it with the command line tool, and merging."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from drift_kernels import Prior, cli
from drift_kernels.prior.summary import group_deltas


def drift_prior(*arguments: object) -> None:
    """Run the command `drift-prior` in this process. Show its output only if it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = cli.main([str(argument) for argument in arguments])
    if status:
        raise RuntimeError(f"drift-prior {' '.join(map(str, arguments))} failed:\n{printed.getvalue()}")


@torch.no_grad()
def add(model: nn.Module, vector: Path, weight: float) -> None:
    """Task arithmetic, in place: add `weight` times a vector, a prior on disk, to the parameters it matches."""
    stored = Prior.open(vector)
    params = dict(model.named_parameters())
    for name, delta_name in stored.match(params.items(), strict=True).matched.items():
        params[name].add_(stored.load(delta_name), alpha=weight)


def random_direction(prior: Path, seed: int) -> dict[str, Tensor]:
    """Deltas in random directions, each with the norm of the prior's."""
    generator, stored = torch.Generator().manual_seed(seed), Prior.open(prior)
    deltas = {}
    for name in stored.names:
        delta = stored.load(name)
        noise = torch.randn(delta.shape, generator=generator)
        deltas[name] = noise * (delta.norm() / noise.norm() if noise.any() else 0.0)
    return deltas


def kept_energy(low_rank: Path) -> float:
    """The share of a prior's energy (its sum of squares) that its low-rank form keeps."""
    (group,) = group_deltas(Prior.open(low_rank), lambda name: True).values()
    return 1.0 if group.kept_energy is None else group.kept_energy
