"""Merging the deltas of several priors: weighted sums, TIES and DARE, elementwise in float32.

    linear      sum of w_i d_i                            task arithmetic (arXiv 2212.04089)
    ties        d_i trimmed, signs elected                TIES (arXiv 2306.01708)
    dare        d_i with elements dropped at random       DARE (arXiv 2311.03099)
    dare_ties   the same, with signs elected

Trimming keeps the fraction `density` of each delta's elements with the largest magnitudes, and all ties with the
smallest of these. Dropping keeps each element with probability `density`, and divides it by `density`. If signs are
elected, an element takes the sign of the weighted sum (positive if that is zero), and sums only the w_i d_i with that
sign. `normalize` divides by the sum of the weights; if signs are elected, by that of the w_i that contribute to the
element.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .runs import Rows
from .threads import in_order

METHODS = ("linear", "ties", "dare", "dare_ties")

_LOW = 15  # the low bits, of the 31 bits of a magnitude, that the second histogram resolves
_DRAWN = 1 << 32  # the range of an element's random number


@dataclass(frozen=True)
class Recipe:
    """A method and its checked parameters; one weight and one density per prior."""

    method: str
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    seed: int

    @classmethod
    def of(
        cls,
        priors: int,
        method: str,
        weights: Sequence[float],
        density: float | Sequence[float] | None,
        normalize: bool | None,
        seed: int,
    ) -> Recipe:
        """Raises ValueError for an unknown method, or for numbers that are out of range or too few or too many."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        weights = tuple(map(float, weights))
        if len(weights) != priors:
            raise ValueError(f"expected a weight for each of the {priors} priors, got {len(weights)} weights")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights must be finite, got {_listed(weights)}")
        if not any(weights):
            raise ValueError("at least one weight must be nonzero: all weights are zero")
        normalize = method == "ties" if normalize is None else normalize
        if normalize and math.isclose(sum(weights), 0, abs_tol=1e-8):
            raise ValueError(f"normalize divides by the sum of the weights, but {_listed(weights)} add up to zero")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        return cls(method, weights, _densities(priors, method, density), normalize, seed)

    @property
    def trims(self) -> bool:
        return self.method == "ties"

    @property
    def drops(self) -> bool:
        return self.method in ("dare", "dare_ties")

    def combine(self, name: str, rows: Rows, deltas: Sequence[Tensor | None], bounds: Sequence[float]) -> Tensor:
        """Combine rows of the delta `name`, given those of each prior (None if a prior has none); float32, 1-D.

        `bounds`: for trimming, the smallest magnitude to keep of each prior's delta (`smallest_kept`).
        """
        parts = [
            (weight, self._sparse(name, rows, position, delta, bounds[position]) * weight)
            for position, (weight, delta) in enumerate(zip(self.weights, deltas, strict=True))
            if delta is not None
        ]
        total = parts[0][1].clone()
        for _, part in parts[1:]:
            total += part
        if self.method in ("linear", "dare"):
            return total / sum(self.weights) if self.normalize else total
        return self._of_one_sign(total, parts)

    def _sparse(self, name: str, rows: Rows, position: int, delta: Tensor, bound: float) -> Tensor:
        density = self.densities[position]
        if density == 1:
            return delta
        if self.trims:
            return torch.where(delta.abs() >= bound, delta, 0.0)
        return torch.where(kept(self.seed, position, name, rows, density), delta / density, 0.0)

    def _of_one_sign(self, total: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
        positive = total >= 0
        combined, weights = torch.zeros_like(total), torch.zeros_like(total)
        for weight, part in parts:
            agrees = torch.where(positive, part > 0, part < 0)
            combined += torch.where(agrees, part, 0.0)
            weights += agrees * weight
        return combined / weights.masked_fill(weights == 0, 1) if self.normalize else combined


def kept(seed: int, position: int, name: str, rows: Rows, density: float) -> Tensor:
    """Bool [rows.count]: which elements are kept, each with probability `density`, to within 2^-32.

    The result depends only on the seed, the prior's position, the delta's name and the element's index, not on the
    machine or the pieces. Philox4x64-10 (Salmon et al., 2011) with the key (seed, CRC-32 of the name) and the position
    in the counter; an element is kept if its 32 bits are below density * 2^32.
    """
    first = rows.start // 8  # one call of philox draws for eight elements, and runs of rows begin at a multiple of 128
    draws = np.random.Philox(key=[seed, zlib.crc32(name.encode())], counter=[first, 0, position, 0])
    bits = draws.random_raw(-(-rows.count // 2)).astype("<u8", copy=False).view("<u4")
    return torch.from_numpy(bits[: rows.count] < round(density * _DRAWN))


def smallest_kept(read: Callable[[Rows], Tensor], rows: Iterable[Rows], numel: int, density: float) -> float:
    """Return the smallest magnitude among the fraction `density` (at least one) of elements with the largest ones.

    The result is exact, in constant memory: the bits of magnitudes sort like their values, so two histograms find it,
    one of the high bits, then one of the low bits within a bucket. `read` returns float32, 1-D.
    """
    rows, most = list(rows), max(1, int(density * numel))

    def high(part: Rows) -> Tensor:
        return torch.bincount(_magnitudes(read(part)) >> _LOW, minlength=1 << (31 - _LOW))

    def low(part: Rows) -> Tensor:
        bits = _magnitudes(read(part))
        return torch.bincount(bits[bits >> _LOW == bucket] & ((1 << _LOW) - 1), minlength=1 << _LOW)

    bucket, left = _where_the_largest_end(_summed(high, rows), most)
    last, _ = _where_the_largest_end(_summed(low, rows), left)
    return torch.tensor(bucket << _LOW | last, dtype=torch.int32, device="cpu").view(torch.float32).item()


def _magnitudes(values: Tensor) -> Tensor:
    return values.abs().view(torch.int32)


def _summed(histogram: Callable[[Rows], Tensor], rows: Iterable[Rows]) -> Tensor:
    found = in_order(histogram, rows)
    _, total = next(found)
    for _, counts in found:
        total += counts
    return total


def _where_the_largest_end(counts: Tensor, most: int) -> tuple[int, int]:
    """Return the bucket with the last of the `most` largest elements, and how many of these it holds."""
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, most))
    bucket = len(counts) - 1 - index
    return bucket, most - int(above[index] - counts[bucket])


def _densities(priors: int, method: str, density: float | Sequence[float] | None) -> tuple[float, ...]:
    if method == "linear":
        if density is not None:
            raise ValueError("density is for ties, dare and dare_ties: linear keeps every element")
        return (1.0,) * priors
    if density is None:
        raise ValueError(f"{method} needs a density, the fraction of each delta's elements to keep")
    found = (float(density),) * priors if isinstance(density, (int, float)) else tuple(map(float, density))
    if len(found) == 1:
        found *= priors
    if len(found) != priors:
        raise ValueError(f"expected one density, or one for each of the {priors} priors, got {len(found)}")
    if not all(0 < each <= 1 for each in found):
        raise ValueError(f"density must be above 0 and at most 1, got {_listed(found)}")
    return found


def _listed(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
