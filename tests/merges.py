"""Experts of one base with their priors, and the formulas of the merging papers, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import text_weights, tuned, write_checkpoint
from torch import Tensor

from drift_kernels import Prior, build_prior

EVERYTHING = ("attn", "mlp", "norms", "embed", "head")


@dataclass
class Family:
    """A base, and experts "a", "b", "c" that were fine-tuned from it."""

    folder: Path
    weights: dict[str, dict[str, Tensor]]

    @classmethod
    def write(cls, folder: Path, shards: int = 1) -> Family:
        base = text_weights()
        base["model.layers.0.mlp.down_proj.weight"] = torch.randn(31, 130)  # blocks of codes end within rows
        base["model.layers.1.mlp.down_proj.weight"] = torch.randn(300, 31)  # several pieces if CHUNK is 1
        weights = {"base": base} | {name: tuned(base) for name in "abc"}
        for name, tensors in weights.items():
            write_checkpoint(folder / name, tensors, shards=shards)
        return cls(folder, weights)

    def prior(self, expert: str, dtype: torch.dtype = torch.float32, **options: object) -> Prior:
        options = {"modules": EVERYTHING, "overwrite": True, **options}
        place = self.folder / f"prior-{expert}"
        return build_prior(self.folder / expert, self.folder / "base", place, dtype=dtype, **options)


def linear(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = False) -> Tensor:
    """Task arithmetic (arXiv 2212.04089)."""
    total = sum(w * d.double() for w, d in zip(weights, deltas, strict=True))
    return total / sum(weights) if normalize else total


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The elements that TIES keeps: the share `density` with the largest magnitudes."""
    most = max(1, int(density * delta.numel()))
    least = delta.abs().flatten().sort(descending=True).values[most - 1]
    return torch.where(delta.abs() >= least, delta, 0)


def elected(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, found: Tensor) -> Tensor:
    """TIES' sign election and disjoint merge (arXiv 2306.01708) of trimmed deltas.

    Where the sum is zero to within its rounding in float32, either sign is right, and that of `found` is taken. For n
    deltas, a density, a quotient, a weight, a product and n - 1 sums are rounded: n + 3 half units of the magnitudes.
    """
    parts = torch.stack([w * d.double() for w, d in zip(weights, deltas, strict=True)])
    total, rounding = parts.sum(0), (len(parts) + 3) * torch.finfo(torch.float32).eps / 2 * parts.abs().sum(0)
    sign = torch.where(torch.where(total.abs() <= rounding, found, total) >= 0, 1.0, -1.0)
    agrees = (parts.sign() == sign).double()
    total = (parts * agrees).sum(0)
    divisor = (torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * deltas[0].ndim) * agrees).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total
