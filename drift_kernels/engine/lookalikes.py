"""Detection of weights passed as deltas: an expert's state_dict instead of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PriorError
from ..prior.deltas import Delta, expanded
from ..sharding import Reduction, Shard

_LEAST_NUMEL = 256  # for random vectors of this length, the cosine exceeds 0.5 once in 10^15
_RATIOS = 0.5, 2.0  # norm(delta)/norm(W)
_COSINE = 0.5
_LOOKED_AT, _ELEMENTS = 8, 1 << 20  # tensors compared, and elements of each


class Candidate(NamedTuple):
    """A delta whose prior records no norm(W), with its parameter; both may be shards."""

    name: str
    param: Tensor
    shard: Shard | None
    shape: tuple[int, ...]  # of the whole
    delta: Delta
    ratio: float  # norm(delta)/norm(W), of the whole


def check_not_weights(candidates: Sequence[Candidate]) -> None:
    """Raise PriorError if these are weights, not differences of weights.

    A difference of about norm(W) that points along W would double the weight. Norms are known. Cosines are computed
    for a few matrices, over up to a million elements each, and only if most deltas have about the norm of their weight.
    """
    matrices = [c for c in candidates if len(c.shape) > 1 and math.prod(c.shape) >= _LEAST_NUMEL]
    alike = [c for c in matrices if _RATIOS[0] < c.ratio < _RATIOS[1]]
    if not alike or 2 * len(alike) < len(matrices):
        return
    alike = alike[:: -(-len(alike) // _LOOKED_AT)]
    products = torch.tensor([_products(c) for c in alike], dtype=torch.float64, device=alike[0].param.device)
    Reduction([c.shard for c in alike]).sum_(products)
    cosines = products[:, 0] / (products[:, 1] * products[:, 2]).sqrt()
    if bool((cosines > _COSINE).all()):
        raise PriorError(
            f"these deltas look like weights, not differences of weights: the delta of {alike[0].name} has "
            f"{alike[0].ratio:.2f} times the norm of the parameter and cosine {cosines[0]:.2f} with it, and all others "
            "that were compared are similar. The deltas of a prior are expert - base (see drift-prior build)"
        )


def _products(candidate: Candidate) -> tuple[float, float, float]:
    """Return <delta, W>, <delta, delta> and <W, W> over the first elements."""
    w = candidate.param.detach().reshape(-1)[:_ELEMENTS].double()
    d = expanded(candidate.delta).reshape(-1)[:_ELEMENTS].to(w.device).double()
    return float(d @ w), float(d @ d), float(w @ w)
