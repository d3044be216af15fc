"""Deltas that are weights: an expert's state_dict in place of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PriorError
from ..prior.deltas import Delta, expanded
from ..sharding import Reduction, Shard

_LEAST_NUMEL = 256  # of random vectors this long, the cosine is beyond 0.5 once in 10^15
_RATIOS = 0.5, 2.0  # norm(delta)/norm(W)
_COSINE = 0.5
_LOOKED_AT, _ELEMENTS = 8, 1 << 20  # tensors, and elements of each


class Candidate(NamedTuple):
    """A delta that was given in memory beside its parameter. A rank of several holds a shard of both."""

    name: str
    param: Tensor
    shard: Shard | None
    shape: tuple[int, ...]  # of the whole
    delta: Delta
    ratio: float  # norm(delta)/norm(W), of the whole


def check_not_weights(candidates: Sequence[Candidate]) -> None:
    """Raises PriorError if these are weights, not differences of weights.

    A difference of norm(W) that points along W would double the weight. Norms are known; the cosines are looked at for
    a few matrices, of up to a million elements each, and only if most have about the norm of their weight.
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
            f"these look like weights, not differences of weights: the delta of {alike[0].name} has "
            f"{alike[0].ratio:.2f} times the norm of the parameter and the cosine {cosines[0]:.2f} to it, and so have "
            f"all that were looked at. A prior is expert - base, for each tensor (drift-prior build)"
        )


def _products(candidate: Candidate) -> tuple[float, float, float]:
    """<delta, W>, <delta, delta> and <W, W> over the first elements."""
    w = candidate.param.detach().reshape(-1)[:_ELEMENTS].double()
    d = expanded(candidate.delta).reshape(-1)[:_ELEMENTS].to(w.device).double()
    return float(d @ w), float(d @ d), float(w @ w)
