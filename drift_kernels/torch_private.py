"""All private torch APIs that this package uses, each with the public alternative and the reason not to use it.

Tested with torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

# The local tensor of a DTensor. Public: `to_local()`, but it creates a new object in every call; for hundreds of
# parameters this takes as long as the rest of a step's host work.
LOCAL_TENSOR = "_local_tensor"
local_tensor = attrgetter(LOCAL_TENSOR)

# The mesh, placements and whole shape of a DTensor as one object, which gradients share with their parameters. Public:
# `device_mesh` and `placements`, but these take two comparisons of many objects.
spec = attrgetter("_spec")


def local_shape_and_offset(tensor: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The shape of a DTensor's local tensor, and its offset in the whole. Public: none."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def is_fsdp1_shard(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has flattened this parameter. Public: none that also recognises the
    views of `use_orig_params=True`."""
    return getattr(param, "_fsdp_flattened", False)


def not_compiled(function: F) -> F:
    """Exclude a function from torch.compile: addresses, cached plans and launches cannot be part of a graph. Public:
    `torch.compiler.disable`, but it imports the compiler at once, which takes most of a second. The private one, which
    torch's own optimizers use, imports it at the first call."""
    disable: Callable[[F], F] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)


def makes_fake_tensors() -> bool:
    """Whether new tensors are fake and have no memory, as under FakeTensorMode. Public: none."""
    return type(torch.empty(0, dtype=torch.float32, device="cpu")).__name__ == "FakeTensor"


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call `callback` at the end of the current backward pass. Public: none."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def unscales_gradients(optimizer_class: C) -> C:
    """Mark an optimizer class, so that `torch.amp.GradScaler.step` leaves gradients scaled and sets attributes on the
    optimizer (see `grad_scaler_says`). Public: none; torch's fused optimizers do the same."""
    optimizer_class._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return optimizer_class


def grad_scaler_says(optimizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """The scale of the gradients and whether any is not finite, during a GradScaler's step; otherwise None and None."""
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


def version_of(tensor: Tensor) -> int:
    """Autograd's count of in-place changes of a tensor. Public: none."""
    return tensor._version
