"""What a param group, its parameters and their gradients may be: checked at the edge, before anything changes."""

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
    """A finite float in [low, high). `where`: added to messages."""
    if type(value) is float:  # in every step, of each group
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
    """What a tensor, or an array of numpy, of one element holds; anything else as it is."""
    return value.item() if _is_scalar(value) or (isinstance(value, np.ndarray) and value.size == 1) else value


def _number_or_tensor(group: dict[str, Any], key: str, index: int, low: float = -math.inf) -> float | Tensor:
    """group[key] as a finite number, or as the tensor that the device will read: of a capturable group, or on a GPU."""
    value = group[key]
    if not _is_scalar(value) or not (group["capturable"] or value.is_cuda):
        return _number(_in(index), key, value, low)
    where = {param.device.type for param in group["params"][:1]}
    if where - {value.device.type}:
        raise ValueError(
            f"{key} must be a number, or a tensor where its parameters are, got a tensor on {value.device} "
            f"for parameters on {where.pop()} (group {index})"
        )
    return value.detach().reshape(())


def _in(index: int) -> str:
    return f" (group {index})"


def check_max_grad_norm(value: object) -> float | None:
    """A norm to clip to, which may be infinite, or None; raises TypeError or ValueError for anything else."""
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
    """Raises ValueError for what torch.optim.AdamW has and this has not. `foreach` and `fused` do not matter."""
    if group.get("amsgrad"):
        raise ValueError(f"amsgrad is not supported: amsgrad must be False, got {group['amsgrad']!r} (group {index})")
    if group.get("differentiable"):
        raise ValueError(
            "autograd cannot go through a fused step: differentiable must be False, got "
            f"{group['differentiable']!r} (group {index})"
        )


def hyperparameters(group: dict[str, Any], index: int) -> Hyperparameters:
    """The hyperparameters of param group number `index`.

    Raises:
        TypeError: one has the wrong type.
        ValueError: one is not finite or out of its range, or the scaling is unknown.
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
    """Raises TypeError or ValueError for a seed that is not an integer of 32 bits."""
    seed = _item(group[SEED])
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got seed={seed!r} of type {type(seed).__name__} (group {index})")
    if not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got seed={seed} (group {index})")


def check_capture(group: dict[str, Any], index: int) -> None:
    """Raises RuntimeError for a group whose step a CUDA graph cannot replay; warns of what each replay would keep."""
    if not group["capturable"]:
        raise RuntimeError(f"a step can be captured in a CUDA graph only with capturable=True (group {index})")
    for key in ("lr", "alpha") if group[FINGERPRINT] else ("lr",):
        if not isinstance(group[key], Tensor):
            message = "every replay of the captured step keeps %s=%s: to change it, pass a tensor (group %d)"
            logger.warning(message, key, group[key], index)


def check_dtype(name: str, param: Tensor) -> None:
    """Raises TypeError, naming the parameter, for one of a dtype that no kernel takes."""
    if param.dtype not in PARAM_DTYPES:
        expected = ", ".join(map(dtype_name, PARAM_DTYPES))
        raise TypeError(f"parameter {name} has dtype {param.dtype}; expected one of {expected}")


def check_param(name: str, param: Tensor) -> None:
    """Raises TypeError or ValueError, naming the parameter, for one that the kernels cannot update."""
    if param.layout != torch.strided:
        raise TypeError(f"parameter {name} is sparse ({param.layout}); only dense parameters are supported")
    check_dtype(name, param)
    if is_fsdp1_shard(param):
        raise TypeError(
            f"parameter {name} is sharded by FullyShardedDataParallel (FSDP1), whose shards are flat and have lost "
            "their shapes: use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"parameter {name} has several elements in one place (shape {tuple(param.shape)}, strides "
            f"{param.stride()}): it is expanded, and cannot be written to; param.data = param.data.contiguous()"
        )


def check_memory(what: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor without memory of its own. Of parameters it is asked when they are stepped: a model
    may be materialised after its optimizer is built."""
    if tensor.numel() and not address_of(tensor):
        raise TypeError(
            f"{what} has no memory of its own: it is on the meta device, freed, fake, or a {type(tensor).__name__} "
            "around other tensors; only plain dense tensors and DTensors of them are supported"
        )


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises TypeError or ValueError, naming the parameter, for a gradient that the kernels cannot read."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"the gradient of parameter {name} is sparse ({grad.layout}); only dense gradients are supported"
        )
    check_memory(f"the gradient of parameter {name}", grad)
    expected = PARAM_DTYPES if param.dtype == torch.float32 else (param.dtype, torch.float32)
    if grad.dtype not in expected:
        raise TypeError(
            f"the gradient of parameter {name}, which is {param.dtype}, has dtype {grad.dtype}; expected one of "
            f"{', '.join(map(str, expected))}"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"the gradient of parameter {name} is {tuple(grad.shape)} on {grad.device}, "
            f"the parameter {tuple(param.shape)} on {param.device}"
        )
