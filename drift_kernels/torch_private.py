"""What this package uses of torch that is not public: here alone, each with the public way and why it will not do.

Tried on torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

# Of a DTensor, what this rank holds. Public: `to_local()`, which makes a new object in every call; for hundreds of
# parameters it takes as long as the rest of a step's host work.
LOCAL_TENSOR = "_local_tensor"
local_tensor = attrgetter(LOCAL_TENSOR)

# Of a DTensor, its mesh, placements and whole shape as one object, which gradients share with their parameters. Public:
# `device_mesh` and `placements`, two comparisons of many objects.
spec = attrgetter("_spec")


def local_shape_and_offset(tensor: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Of a DTensor, the shape of what this rank holds and where that begins in the whole. Public: none."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def is_fsdp1_shard(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has flattened this parameter. Public: none that also finds the views of
    `use_orig_params=True`."""
    return getattr(param, "_fsdp_flattened", False)


def not_compiled(function: F) -> F:
    """torch.compile leaves the function alone: a step is addresses, cached plans and launches, which no graph could
    hold. Public: `torch.compiler.disable`, which imports the compiler at once, for most of a second; this one, which
    torch's own optimizers use, imports it at the first call."""
    disable: Callable[[F], F] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)


def makes_fake_tensors() -> bool:
    """Whether new tensors are fake, without memory, as under FakeTensorMode. Public: none."""
    return type(torch.empty(0, dtype=torch.float32, device="cpu")).__name__ == "FakeTensor"


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls it when the backward pass that is going on has ended. Public: none."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def unscales_gradients(optimizer_class: C) -> C:
    """Marks an optimizer class for `torch.amp.GradScaler.step`, which then leaves gradients scaled, and what `step`
    needs on the optimizer: see `grad_scaler_says`. Public: none; torch's fused optimizers do the same."""
    optimizer_class._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return optimizer_class


def grad_scaler_says(optimizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """The scale of the gradients, and whether one is not finite, while a GradScaler steps; otherwise None and None."""
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to in place, as autograd counts."""
    return tensor._version
