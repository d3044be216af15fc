"""The prior's two uses outside the optimizer: building it with the command line tool, and merging."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import nn

from drift_kernels import Prior, cli


def drift_prior(*arguments: object) -> None:
    """Run the command `drift-prior` in this process. What it prints is shown when it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = cli.main([str(argument) for argument in arguments])
    if status:
        raise RuntimeError(f"drift-prior {' '.join(map(str, arguments))} failed:\n{printed.getvalue()}")


@torch.no_grad()
def merge(model: nn.Module, task_vector: Path, weight: float) -> None:
    """Task arithmetic, in place: add `weight` times the task vector, a prior on disk, to the parameters it matches."""
    vector = Prior.open(task_vector)
    params = dict(model.named_parameters())
    for name, delta_name in vector.match(params.items(), strict=True).matched.items():
        params[name].add_(vector.load(delta_name), alpha=weight)
