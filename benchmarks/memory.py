"""The memory of a contender, as it is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .contender import Contender


def state_bytes(contender: Contender) -> int | None:
    """What it keeps on its parameters' device beside params and gradients: states, and deltas under a prior.

    None for a contender without an optimizer. States are there after the first step.
    """
    if contender.optimizer is None:
        return None
    device = contender.optimizer.param_groups[0]["params"][0].device
    states = list(contender.optimizer.state.values())
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors([states, list(contender.deltas)])
        if tensor.device == device
    }
    return sum(storages.values())


def peak_extra_bytes(contender: Contender, device: torch.device) -> int | None:
    """How far one step goes above the memory that was allocated before it; None where the device does not count."""
    if device.type != "cuda":
        return None
    contender.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
