"""The memory of a contender, as it is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .contender import Contender


class Memory(NamedTuple):
    """Of one contender, in bytes; None for what has no optimizer, or where the device does not count.

    Attributes:
        state_bytes: what it keeps on its parameters' device beside params and gradients: states, and deltas under a
            prior.
        stored_bytes: that and the parameters.
        peak_extra_bytes: how far one step goes above the memory that was allocated before it.
    """

    state_bytes: int | None
    stored_bytes: int | None
    peak_extra_bytes: int | None

    @classmethod
    def of(cls, contender: Contender, device: torch.device) -> Memory:
        """After the first step, when there are states."""
        kept = state_bytes(contender)
        params = _params(contender)
        stored = None if kept is None else kept + sum(param.nbytes for param in params)
        return cls(kept, stored, peak_extra_bytes(contender, device))


def state_bytes(contender: Contender) -> int | None:
    if contender.optimizer is None:
        return None
    device = _params(contender)[0].device
    states = list(contender.optimizer.state.values())
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors([states, list(contender.deltas)])
        if tensor.device == device
    }
    return sum(storages.values())


def peak_extra_bytes(contender: Contender, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    contender.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _params(contender: Contender) -> list[Tensor]:
    groups = [] if contender.optimizer is None else contender.optimizer.param_groups
    return [param for group in groups for param in group["params"]]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a state, which other libraries wrap in subclasses and in objects of their own."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
