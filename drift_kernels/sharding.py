"""DTensor parameters: local tensors, their position in the whole tensor, and sums over the ranks.

Kernels see only local tensors, and a step dispatches no operation on a DTensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .formats.philox import WHOLE, Place
from .torch_private import local_shape_and_offset, local_tensor, spec


def dtensor_type() -> Any:
    """The class DTensor; None if it has not been imported, because then there are no DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return type(tensor) is dtensor_type()


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor; any other tensor unchanged."""
    return local_tensor(tensor) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered over all ranks if it is a DTensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_pairs(params: list[Tensor], grads: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the local tensors of parameters and gradients. Gradients with other placements than their parameters
    (partial sums, say) are first redistributed, which every rank must take part in."""
    dtensor = dtensor_type()
    types = set() if dtensor is None else set(map(type, params))
    if dtensor not in types:
        return params, grads
    if types == {dtensor} == set(map(type, grads)) and all(map(is_, map(spec, grads), map(spec, params))):
        return list(map(local_tensor, params)), list(map(local_tensor, grads))
    return [local(param) for param in params], [
        grad if grad is None else local(_placed_as(grad, param)) for grad, param in zip(grads, params, strict=True)
    ]


def place_grads(params: list[Tensor]) -> None:
    """Redistribute the gradients that have other placements than their parameters, and store them in `param.grad`."""
    for param in params if dtensor_type() in set(map(type, params)) else ():
        if param.grad is not None:
            param.grad = _placed_as(param.grad, param)


def _placed_as(grad: Any, param: Any) -> Tensor:
    if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def wrap(tensor: Tensor, like: Any, shape: Sequence[int] | None = None) -> Tensor:
    """Wrap a local tensor as a DTensor sharded like `like`, of its shape or of `shape`; unchanged if `like` is not a
    DTensor."""
    if not is_sharded(like):
        return tensor
    whole = tuple(like.shape if shape is None else shape)
    strides = tuple(math.prod(whole[d + 1 :]) for d in range(len(whole)))
    return dtensor_type().from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=torch.Size(whole), stride=strides
    )


def part_for(target: Tensor, value: Tensor) -> Tensor:
    """Return the part of a saved tensor, whole or sharded, that this rank holds under the sharding of `target`. A
    sharded int16 tensor is returned as int32, because collectives do not support int16."""
    if is_sharded(value) and value.dtype == torch.int16:
        value = value.to(torch.int32)
    if not is_sharded(target):
        return whole(value)
    if not is_sharded(value):
        return value[Shard.of(target).box]  # type: ignore[union-attr]
    return local(value.redistribute(target.device_mesh, target.placements))  # type: ignore[attr-defined]


def keeps_blocks(param: Any, size: int) -> bool:
    """Whether the sharding of a DTensor splits no block of `size` elements, counted row by row."""
    if param.dim() < 2 or param.shape[-1] % size:
        return False
    last = param.dim() - 1
    parts = [n for n, p in zip(param.device_mesh.shape, param.placements, strict=True) if _dim(p, last)]
    return not parts or param.shape[-1] % (size * math.prod(parts)) == 0


def _dim(placement: Any, dim: int) -> bool:
    return not placement.is_replicate() and placement.dim == dim


@dataclass(frozen=True)
class Shard:
    """The position of this rank's part in the whole tensor.

    Attributes:
        shape: the shape of the whole tensor.
        box: the slice of the part in each dimension.
        groups: for each mesh dimension that shards the tensor, the process group with the other parts.
    """

    shape: tuple[int, ...]
    box: tuple[slice, ...]
    groups: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Any) -> Shard | None:
        """The shard of a DTensor; None for any other tensor. Raises ValueError if the tensor is a partial sum."""
        if not is_sharded(tensor):
            return None
        mesh, placements = tensor.device_mesh, tensor.placements
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"a DTensor that is a partial sum cannot be updated, got placements {placements}")
        sizes, offsets = local_shape_and_offset(tensor)
        box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        groups = [mesh.get_group(d) for d, placement in enumerate(placements) if not placement.is_replicate()]
        return cls(tuple(tensor.shape), box, tuple(groups))

    @property
    def place(self) -> Place | None:
        """The position of its elements, in flat order, in the whole; None if they are not evenly spaced runs."""
        sizes = [part.stop - part.start for part in self.box]
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        origin = sum(part.start * stride for part, stride in zip(self.box, strides, strict=True))
        cut = [d for d, (size, whole) in enumerate(zip(sizes, self.shape, strict=True)) if size != whole]
        if not cut or cut[-1] == 0 or 0 in sizes:
            return Place(origin)
        if any(d > 0 for d in cut[:-1]):
            return None
        inner = cut[-1]
        return Place(origin, sizes[inner] * strides[inner], self.shape[inner] * strides[inner])


def place_of(name: str, shard: Shard | None, needed: bool) -> Place:
    """The place that indexes a parameter's random bits. Raises ValueError, naming the parameter, if `needed` and there
    is none."""
    place = WHOLE if shard is None else shard.place
    if shard is not None and place is None and needed:
        raise ValueError(
            "rounding='stochastic' does not support a parameter that is sharded along more than one inner dimension, "
            f"got {name} of shape {shard.shape}"
        )
    return place or WHOLE


class Reduction:
    """Sums over the ranks that hold parts of the same tensors: one all-reduce per dimension of each mesh."""

    def __init__(self, shards: Sequence[Shard | None]) -> None:
        rows: dict[Any, list[int]] = {}
        for row, shard in enumerate(shards):
            for group in () if shard is None else shard.groups:
                rows.setdefault(group, []).append(row)
        self._steps = [
            (group, None if len(of) == len(shards) else torch.tensor(of, dtype=torch.int64, device="cpu"))
            for group, of in rows.items()
        ]

    def __bool__(self) -> bool:
        return bool(self._steps)

    def any_of(self, values: Sequence[Tensor | float], device: torch.device) -> bool:
        """Whether any of these numbers is nonzero on any rank. All ranks get the same answer."""
        found = torch.tensor(list(map(float, values)), dtype=torch.float64, device=device)
        self.sum_(found)
        return bool((found != 0).any())

    @property
    def groups(self) -> list[Any]:
        return [group for group, _ in self._steps]

    def sum_(self, values: Tensor) -> None:
        """Replace each row of `values` [n, ...], one row per shard, with its sum over all parts of the tensor."""
        for group, rows in self._steps:
            if rows is None:
                dist.all_reduce(values, group=group)
            else:
                some = values[rows]
                dist.all_reduce(some, group=group)
                values[rows] = some
