"""Optimizers of other libraries, if installed: rivals without a prior, on a GPU, and some on a CPU.

Each is built as its documentation describes, with the hyperparameters shared by all; other options keep its defaults.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .contender import Contender, nothing
from .modes import Storage
from .peers import after_clipping
from .problem import ADAMW, Problem

Dtypes = tuple[torch.dtype, ...]
PROBE_NUMEL = 4096  # large enough for the 8-bit optimizers to use 8 bits


def _float32(dtype: torch.dtype) -> Dtypes:
    return torch.float32, torch.float32


def _eight_bits(dtype: torch.dtype) -> Dtypes:
    return torch.uint8, torch.uint8


def _as_params(dtype: torch.dtype) -> Dtypes:
    return dtype, dtype


def _with_correction(dtype: torch.dtype) -> Dtypes:
    """Adds a third state for low-precision parameters: their rounding error."""
    return (dtype, dtype) if dtype == torch.float32 else (dtype, dtype, dtype)


def _eight_bits_with_correction(dtype: torch.dtype) -> Dtypes:
    return torch.uint8, torch.uint8, torch.uint8


@dataclass(frozen=True)
class Library:
    """An optimizer class of another library.

    Attributes:
        label: for tables and plots.
        path: module and class.
        states: the dtypes of its states for a parameter dtype, one element each; block scales are not counted.
        options: of its constructor, in addition to those of AdamW.
        on_cpu: whether it has CPU kernels too.
    """

    label: str
    path: str
    states: Callable[[torch.dtype], Dtypes]
    options: dict[str, Any] = field(default_factory=dict)
    on_cpu: bool = False

    def build(self, params: list[Tensor]) -> Optimizer:
        module, name = self.path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(params, **ADAMW, **self.options)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """The bytes of the states per element."""
        return sum(state.itemsize for state in self.states(dtype))


LIBRARIES = {
    "bnb": Library("bitsandbytes AdamW, 32-bit", "bitsandbytes.optim.AdamW", _float32, {"optim_bits": 32}),
    "bnb_8bit": Library("bitsandbytes AdamW8bit", "bitsandbytes.optim.AdamW8bit", _eight_bits, on_cpu=True),
    "torchao": Library("torchao _AdamW", "torchao.optim._AdamW", _as_params),
    "torchao_8bit": Library("torchao AdamW8bit", "torchao.optim.AdamW8bit", _eight_bits),
    "optimi": Library("optimi AdamW", "optimi.AdamW", _with_correction, {"triton": True}),
    "flashoptim": Library("FlashOptim AdamW", "flashoptim.FlashAdamW", _eight_bits_with_correction),
    "deepspeed": Library(
        "DeepSpeedCPUAdam",
        "deepspeed.ops.adam.DeepSpeedCPUAdam",
        _float32,
        {"adamw_mode": True, "fp32_optimizer_states": True},
        on_cpu=True,
    ),
    "apex": Library("apex FusedAdam", "apex.optimizers.FusedAdam", _float32, {"adam_w_mode": True}),
    "te": Library(
        "Transformer Engine FusedAdam",
        "transformer_engine.pytorch.optimizers.FusedAdam",
        _float32,
        {"adam_w_mode": True},
    ),
}


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a library cannot step on this device, in one line; None if it can, after taking a step."""
    library = LIBRARIES[name]
    if device.type != "cuda" and not library.on_cpu:
        return "it is measured on GPUs only"
    try:
        importlib.import_module(library.path.partition(".")[0])
    except Exception as error:  # an import may also fail because of a shared library or another torch version
        return first_line(error)
    return probe(library, device, dtype)


def probe(library: Library, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library's optimizer fails on one small tensor, in one line; None if it does not."""
    param = torch.ones(PROBE_NUMEL, dtype=dtype, device=device)
    param.grad = torch.ones_like(param)
    try:
        library.build([param]).step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # the others can be measured, whatever this library raises
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def make(name: str, problem: Problem, clip: bool = False) -> Contender:
    library = LIBRARIES[name]
    params = problem.own_params(problem.scratch_grads if clip else None)
    optimizer = library.build(params)
    return Contender(
        name,
        library.label,
        None,
        library.states(problem.dtype)[0],
        problem.bytes_to_move(None, Storage.plain(library.state_bytes(problem.dtype), 0), clip),
        after_clipping(params, optimizer.step) if clip else optimizer.step,
        optimizer,
        problem.restore_scratch_grads if clip else nothing,
        clip,
    )
