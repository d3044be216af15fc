"""What is left of the way to the expert: deltas that shrink as the parameters arrive, renewed in place in every step.

target = W + delta                    as W is when it is first stepped; kept in the parameter's state
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
    """Of one parameter, of which this rank holds a shard or all.

    Attributes:
        target: float32, bfloat16 for a bfloat16 parameter.
        left: the delta, likewise.
        norm: float64 [], of the delta of the whole parameter.
        whole_norm: likewise, of the prior's delta.
    """

    target: Tensor
    left: Tensor
    norm: Tensor
    whole_norm: Tensor
    shard: Shard | None


class Anchors:
    """Of parameters that are trained themselves, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Anchor] = {}

    def bind(self, name: str, param: Tensor, state: dict[str, Any], delta: Delta | None, delta_norm: float) -> Anchor:
        """`param`: whole, as `state` is of it. `delta`: the prior's, of what this rank holds, at the first time;
        `delta_norm`: that of the whole."""
        own = local(param)
        found, saved = self._held.get(name), state.get(TARGET)
        if found is not None and saved is not None and local(saved) is found.target:
            return found
        if saved is None and found is not None:  # whoever has emptied the state has not moved the expert
            state[TARGET] = wrap(found.target, param)
            return found
        if saved is None:
            assert delta is not None
            dtype = torch.bfloat16 if own.dtype == torch.bfloat16 else torch.float32
            target = (own.detach().float() + expanded(delta).to(own.device)).to(dtype).contiguous()
            state[TARGET] = wrap(target, param)
        else:
            target = local(saved)
        norm = torch.zeros((), dtype=torch.float64, device=own.device)
        whole_norm = torch.full_like(norm, delta_norm)
        self._held[name] = Anchor(target, torch.zeros_like(target), norm, whole_norm, Shard.of(param))
        return self._held[name]

    def nbytes(self) -> int:
        """Of the targets."""
        return sum(anchor.target.nbytes for anchor in self._held.values())

    def renew(self, params: Mapping[str, Tensor], with_norms: bool) -> None:
        """The deltas of these parameters, of which this rank holds what is given. The host waits for nothing."""
        anchors = [self._held[name] for name in params]
        for anchor, param in zip(anchors, params.values(), strict=True):
            torch.sub(anchor.target, param.detach(), out=anchor.left)
        if not anchors or not with_norms:  # another pass, and an all-reduce
            return
        norms = [torch.linalg.vector_norm(anchor.left, dtype=torch.float64) for anchor in anchors]
        squares = torch.stack(norms).square_()
        Reduction([anchor.shard for anchor in anchors]).sum_(squares)
        for anchor, norm in zip(anchors, squares.sqrt_(), strict=True):
            anchor.norm.copy_(norm)
