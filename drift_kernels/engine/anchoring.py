"""Anchored deltas: the remaining distance to the expert, which shrinks during training and is renewed in every step.

target = W + delta                    with W at its first step; kept in the parameter's state
delta  = target - W                   from then on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prior.deltas import Delta, expanded
from ..sharding import Reduction, Shard, local, wrap
from ..state.precision import TARGET


@dataclass(frozen=True)
class Anchor:
    """The anchor of one parameter; of its local tensor, if it is sharded.

    Attributes:
        target: float32, or bfloat16 for a bfloat16 parameter.
        left: the remaining delta, of the same dtype.
        norm: float64 [], the norm of the remaining delta of the whole parameter.
        whole_norm: likewise, the norm of the prior's delta.
    """

    target: Tensor
    left: Tensor
    norm: Tensor
    whole_norm: Tensor
    shard: Shard | None


class Anchors:
    """The anchors of parameters without adapters, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Anchor] = {}

    def bind(self, name: str, param: Tensor, state: dict[str, Any], delta: Delta | None, delta_norm: float) -> Anchor:
        """Return the anchor of a parameter; create it if there is none.

        Args:
            param: the whole parameter, which `state` belongs to.
            delta: the prior's delta for the local tensor; needed the first time.
            delta_norm: the norm of the whole delta.
        """
        own = local(param)
        found, saved = self._held.get(name), state.get(TARGET)
        if found is not None and saved is not None and local(saved) is found.target:
            return found
        if saved is None and found is not None:  # the state was emptied, but the expert has not moved
            state[TARGET] = wrap(found.target, param)
            return found
        if saved is None:
            assert delta is not None
            dtype = torch.bfloat16 if own.dtype == torch.bfloat16 else torch.float32
            target = (own.float() + expanded(delta).to(own.device)).to(dtype).contiguous()
            state[TARGET] = wrap(target, param)
        else:
            target = local(saved)
        norm = torch.zeros((), dtype=torch.float64, device=own.device)
        whole_norm = torch.full_like(norm, delta_norm)
        self._held[name] = Anchor(target, torch.zeros_like(target), norm, whole_norm, Shard.of(param))
        return self._held[name]

    def nbytes(self) -> int:
        """The bytes of the targets."""
        return sum(anchor.target.nbytes for anchor in self._held.values())

    def renew(self, params: Mapping[str, Tensor], with_norms: bool) -> None:
        """Renew the deltas of these parameters, given their local tensors. No host sync."""
        anchors = [self._held[name] for name in params]
        for anchor, param in zip(anchors, params.values(), strict=True):
            torch.sub(anchor.target, param.detach(), out=anchor.left)
        if not anchors or not with_norms:  # norms cost another pass and an all-reduce
            return
        norms = [torch.linalg.vector_norm(anchor.left, dtype=torch.float64) for anchor in anchors]
        squares = torch.stack(norms).square_()
        Reduction([anchor.shard for anchor in anchors]).sum_(squares)
        for anchor, norm in zip(anchors, squares.sqrt_(), strict=True):
            anchor.norm.copy_(norm)
