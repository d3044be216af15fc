"""How the deltas of several priors become one: weighted sums, TIES and DARE, element by element in float32.

    linear      sum of w_i d_i                            task arithmetic (arXiv 2212.04089)
    ties        d_i trimmed, signs elected                TIES (arXiv 2306.01708)
    dare        d_i with elements dropped at random       DARE (arXiv 2311.03099)
    dare_ties   the same, with signs elected

Trimming keeps of each delta the share `density` of its elements that are the largest in magnitude; with them, all that
equal the smallest of these. Dropping keeps each element with the probability `density`, and divides it by that. Where
signs are elected, an element has the sign of the weighted sum (positive if that is zero), and is made of those
w_i d_i alone that have it. `normalize` divides by the sum of the weights: where signs are elected, of those that take
part in the element.
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

_LOW = 15  # of the 31 bits of a magnitude, those that the second histogram tells apart
_DRAWN = 1 << 32  # what an element draws its chance from


@dataclass(frozen=True)
class Recipe:
    """A method and its numbers, checked; weights and densities of each prior."""

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
        """Raises ValueError for an unknown method, numbers out of range, or as many as there are priors."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        weights = tuple(map(float, weights))
        if len(weights) != priors:
            raise ValueError(f"expected a weight for each of the {priors} priors, got {len(weights)} weights")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights must be finite, got {_listed(weights)}")
        if not any(weights):
            raise ValueError("all weights are zero: nothing would be left of the priors")
        normalize = method == "ties" if normalize is None else normalize
        if normalize and math.isclose(sum(weights), 0, abs_tol=1e-8):
            raise ValueError(f"the weights {_listed(weights)} add up to zero, by which normalize would divide")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be a number from 0 to 2^64 - 1, got {seed}")
        return cls(method, weights, _densities(priors, method, density), normalize, seed)

    @property
    def trims(self) -> bool:
        return self.method == "ties"

    @property
    def drops(self) -> bool:
        return self.method in ("dare", "dare_ties")

    def combine(self, name: str, rows: Rows, deltas: Sequence[Tensor | None], bounds: Sequence[float]) -> Tensor:
        """Rows of the delta `name`, float32 1-D, of those of each prior, None where a prior has none.

        `bounds`: the smallest magnitude that is kept of each prior's, where it is trimmed (`smallest_kept`).
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
    """Bool [rows.count]: which elements are kept, each with the probability `density`, to within 2^-32.

    It follows from the seed, the prior's position, the delta's name and the element's index: no matter on which machine
    or in which pieces. Philox4x64-10 (Salmon et al., 2011) with the key (seed, CRC-32 of the name) and the position in
    the counter; an element is kept if its 32 bits are below density * 2^32.
    """
    first = rows.start // 8  # one call of philox draws for eight elements, and runs of rows begin at a multiple of 128
    draws = np.random.Philox(key=[seed, zlib.crc32(name.encode())], counter=[first, 0, position, 0])
    bits = draws.random_raw(-(-rows.count // 2)).astype("<u8", copy=False).view("<u4")
    return torch.from_numpy(bits[: rows.count] < round(density * _DRAWN))


def smallest_kept(read: Callable[[Rows], Tensor], rows: Iterable[Rows], numel: int, density: float) -> float:
    """The smallest magnitude among the share `density`, of at least one element, that is the largest in magnitude.

    Exactly, and in flat memory: the bits of magnitudes are in the order of their values, and two histograms find them,
    of their high bits and then of the low bits in one bucket. `read` gives float32 1-D.
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
    """The bucket in which the `most` largest end, and how many of these are in it."""
    above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, most))
    bucket = len(counts) - 1 - index
    return bucket, most - int(above[index] - counts[bucket])


def _densities(priors: int, method: str, density: float | Sequence[float] | None) -> tuple[float, ...]:
    if method == "linear":
        if density is not None:
            raise ValueError("density belongs to ties, dare and dare_ties: linear keeps every element")
        return (1.0,) * priors
    if density is None:
        raise ValueError(f"{method} needs a density, the share of elements that is kept of each delta")
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
