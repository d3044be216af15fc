"""The optimizer for a model, as all integrations make it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..adapters import AdapterPrior
from ..optimizer import FusedDriftAdamW
from ..prior import PriorLike
from .named_groups import named_groups

PriorForModel = PriorLike | AdapterPrior | Callable[[nn.Module], PriorLike | AdapterPrior]
"""A prior for FusedDriftAdamW, or a function of the model that returns one."""


def drift_optimizer(
    model: nn.Module,
    *,
    prior: PriorForModel | None = None,
    weight_decay: float = 1e-2,
    refresh: int = 1,
    **options: Any,
) -> FusedDriftAdamW:
    """Return a `FusedDriftAdamW` for the model's trainable parameters, with their names. Biases and norms do not decay.

    Args:
        model: the model as it is trained: after adapters were added and parameters frozen.
        prior: as in `FusedDriftAdamW`, or a function of the model that returns it. If the model has LoRA layers, it is
            projected onto them (`lora_prior`).
        weight_decay: of the parameters of two or more dimensions.
        refresh: as in `lora_prior`; no effect without adapters.
        options: other arguments of `FusedDriftAdamW`.

    Raises:
        TypeError, ValueError, PriorError, BackendUnavailableError: as `FusedDriftAdamW` and `lora_prior`.
    """
    return FusedDriftAdamW(named_groups(model, weight_decay), prior=prior_for(model, prior, refresh), **options)


def prior_for(model: nn.Module, prior: PriorForModel | None, refresh: int = 1) -> PriorLike | AdapterPrior | None:
    """Return the prior as `FusedDriftAdamW` and `attach_prior` take it, projected onto the model's LoRA layers, if any.

    Args:
        model: the model as it is trained.
        prior: as in `drift_optimizer`.
        refresh: as in `lora_prior`.
    """
    if callable(prior):
        return prior(model)
    if prior is None or isinstance(prior, AdapterPrior) or not _has_lora(model):
        return prior
    from .peft import lora_prior

    return lora_prior(model, prior, refresh=refresh)


def _has_lora(model: nn.Module) -> bool:
    """Whether PEFT has added LoRA layers. Does not import PEFT: if it has, PEFT is imported already."""
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and any(isinstance(module, lora.LoraLayer) for module in model.modules())


_TAKEN = {*inspect.signature(FusedDriftAdamW.__init__).parameters, *inspect.signature(drift_optimizer).parameters}


def check_options(options: Mapping[str, Any]) -> None:
    """Check keywords before the optimizer is made.

    Args:
        options: keywords for `drift_optimizer`.

    Raises:
        TypeError: `drift_optimizer` does not take one of them.
    """
    if unknown := sorted(set(options) - _TAKEN):
        raise TypeError(f"FusedDriftAdamW got unexpected keyword arguments: {', '.join(unknown)}")
