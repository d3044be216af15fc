"""Checks of param groups, parameters and gradients, made before anything changes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..kernels.coefficients import Hyperparameters
from ..kernels.describe import address_of
from ..kernels.operands import dtype_name
from ..kernels.scalings import SCALINGS
from ..state.param_groups import FINGERPRINT, SEED
from ..torch_private import is_fsdp1_shard

logger = logging.getLogger("drift_kernels")

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _number(where: str, key: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a finite float in [low, high). `where`: added to messages."""
    if type(value) is float:  # the common case
        number = value
    else:
        value = _item(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{key} must be a number, got {key}={value!r} of type {type(value).__name__}{where}")
        number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{key} must be finite, got {key}={number}{where}")
    if not low <= number < high:
        bounds = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        raise ValueError(f"{key} must be {bounds}, got {key}={number}{where}")
    return number


def _is_scalar(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool


def _item(value: object) -> object:
    """The value of a one-element tensor or numpy array; anything else unchanged."""
    return value.item() if _is_scalar(value) or (isinstance(value, np.ndarray) and value.size == 1) else value


def _number_or_tensor(group: dict[str, Any], key: str, index: int, low: float = -math.inf) -> float | Tensor:
    """Return group[key] as a finite number, or as a tensor for the device to read, if it is on a GPU or the group is
    capturable."""
    value = group[key]
    if not _is_scalar(value) or not (group["capturable"] or value.is_cuda):
        return _number(_in(index), key, value, low)
    where = {param.device.type for param in group["params"][:1]}
    if where - {value.device.type}:
        raise ValueError(
            f"{key} must be a number, or a tensor on the device of its parameters, got a tensor on {value.device} "
            f"for parameters on {where.pop()} (group {index})"
        )
    return value.detach().reshape(())


def _in(index: int) -> str:
    return f" (group {index})"


def check_max_grad_norm(value: object) -> float | None:
    """Return a positive norm, possibly infinite, or None; raise TypeError or ValueError for anything else."""
    value = _item(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"max_grad_norm must be a number or None, got {value!r} of type {type(value).__name__}")
    norm = float(value)
    if not norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {norm}")
    return norm


def _check_lacks(group: dict[str, Any], index: int) -> None:
    """Raise ValueError for unsupported options of torch.optim.AdamW. `foreach` and `fused` are ignored."""
    if group.get("amsgrad"):
        raise ValueError(f"amsgrad is not supported: amsgrad must be False, got {group['amsgrad']!r} (group {index})")
    if group.get("differentiable"):
        raise ValueError(
            "autograd cannot differentiate a fused step: differentiable must be False, got "
            f"{group['differentiable']!r} (group {index})"
        )


def hyperparameters(group: dict[str, Any], index: int) -> Hyperparameters:
    """Return the hyperparameters of param group `index`.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is not finite or out of range, or the scaling is unknown.
    """
    betas = group["betas"]
    if not isinstance(betas, Sequence) or isinstance(betas, (str, bytes)) or len(betas) != 2:
        raise TypeError(
            f"betas must be a sequence of two numbers, got betas={betas!r} of type {type(betas).__name__} "
            f"(group {index})"
        )
    scaling = group["prior_scaling"]
    if scaling not in SCALINGS:
        raise ValueError(f"prior_scaling must be one of {', '.join(SCALINGS)}, got {scaling!r} (group {index})")
    _check_lacks(group, index)
    where = _in(index)
    return Hyperparameters(
        lr=_number_or_tensor(group, "lr", index, low=0.0),
        beta1=_number(where, "betas[0]", betas[0], low=0.0, high=1.0),
        beta2=_number(where, "betas[1]", betas[1], low=0.0, high=1.0),
        eps=_number(where, "eps", group["eps"], low=0.0),
        weight_decay=_number(where, "weight_decay", group["weight_decay"], low=0.0),
        maximize=bool(group["maximize"]),
        alpha=_number_or_tensor(group, "alpha", index),
        scaling=scaling,
        normalize_to_param=bool(group["normalize_to_param"]),
    )


def check_seed(group: dict[str, Any], index: int) -> None:
    """Raise TypeError or ValueError unless the seed is an unsigned 32-bit integer."""
    seed = _item(group[SEED])
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got seed={seed!r} of type {type(seed).__name__} (group {index})")
    if not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got seed={seed} (group {index})")


def check_capture(group: dict[str, Any], index: int) -> None:
    """Raise RuntimeError if a CUDA graph cannot replay the group's step; warn of values that replays cannot change."""
    if not group["capturable"]:
        raise RuntimeError(f"capturing a step in a CUDA graph requires capturable=True (group {index})")
    for key in ("lr", "alpha") if group[FINGERPRINT] else ("lr",):
        if not isinstance(group[key], Tensor):
            message = "every replay of the captured step uses %s=%s; pass a tensor to change it (group %d)"
            logger.warning(message, key, group[key], index)


def check_dtype(name: str, param: Tensor) -> None:
    """Raise TypeError, naming the parameter, if no kernel supports its dtype."""
    if param.dtype not in PARAM_DTYPES:
        expected = ", ".join(map(dtype_name, PARAM_DTYPES))
        raise TypeError(f"parameter {name} has dtype {param.dtype}; expected one of {expected}")


def check_param(name: str, param: Tensor) -> None:
    """Raise TypeError or ValueError, naming the parameter, if the kernels cannot update it."""
    if param.layout != torch.strided:
        raise TypeError(f"parameter {name} is sparse ({param.layout}); only dense parameters are supported")
    check_dtype(name, param)
    if is_fsdp1_shard(param):
        raise TypeError(
            f"parameter {name} is sharded by FullyShardedDataParallel (FSDP1), which flattens parameters so that their "
            "shapes are lost: use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"parameter {name} is expanded: several of its elements share memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}), so it cannot be updated; set param.data = param.data.contiguous()"
        )


def check_memory(what: str, tensor: Tensor) -> None:
    """Raise TypeError if a tensor has no memory of its own. Parameters are checked only in a step, because a model may
    be materialised after its optimizer is built."""
    if tensor.numel() and not address_of(tensor):
        raise TypeError(
            f"{what} has no memory of its own: it is on the meta device, freed, fake, or a {type(tensor).__name__} "
            "around other tensors; only plain dense tensors and DTensors of them are supported"
        )


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """Raise TypeError or ValueError, naming the parameter, if the kernels cannot read its gradient."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"the gradient of parameter {name} is sparse ({grad.layout}); only dense gradients are supported"
        )
    check_memory(f"the gradient of parameter {name}", grad)
    expected = PARAM_DTYPES if param.dtype == torch.float32 else (param.dtype, torch.float32)
    if grad.dtype not in expected:
        raise TypeError(
            f"the gradient of parameter {name} has dtype {grad.dtype}; expected one of "
            f"{', '.join(map(str, expected))} for a {param.dtype} parameter"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"the gradient of parameter {name} has shape {tuple(grad.shape)} on {grad.device}, but the parameter has "
            f"shape {tuple(param.shape)} on {param.device}"
        )
