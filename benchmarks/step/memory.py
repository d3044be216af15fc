"""The memory that a contender allocates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .contender import Contender


class Memory(NamedTuple):
    """The memory of one contender, in bytes; None without an optimizer, or if the device does not count it.

    Attributes:
        state_bytes: what it keeps on its parameters' device besides params and gradients: states, and deltas under a
            prior.
        stored_bytes: state_bytes and the parameters.
        peak_extra_bytes: how far one step exceeds the memory allocated before it.
    """

    state_bytes: int | None
    stored_bytes: int | None
    peak_extra_bytes: int | None

    @classmethod
    def of(cls, contender: Contender, device: torch.device) -> Memory:
        """Measure after the first step, when states exist."""
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
    """Yield the plain tensors in a state; other libraries wrap them in subclasses and objects of their own."""
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
