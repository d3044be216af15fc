"""The optimizer for a model, as every trainer's integration makes it."""

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
"""What FusedDriftAdamW takes, or a function of the model that gives it."""


def drift_optimizer(
    model: nn.Module,
    *,
    prior: PriorForModel | None = None,
    weight_decay: float = 1e-2,
    refresh: int = 1,
    **options: Any,
) -> FusedDriftAdamW:
    """A FusedDriftAdamW of the model's trainable parameters, with their names; biases and norms do not decay.

    Args:
        model: as it is trained: after adapters have been put in and parameters frozen.
        prior: what FusedDriftAdamW takes, or a function of the model that gives it. For a model with active LoRA layers
            it is projected onto them (`lora_prior`).
        weight_decay: of the parameters of two or more dimensions.
        refresh: as in `lora_prior`; without adapters of no effect.
        options: FusedDriftAdamW's.

    Raises what FusedDriftAdamW and `lora_prior` do.
    """
    return FusedDriftAdamW(named_groups(model, weight_decay), prior=prior_for(model, prior, refresh), **options)


def prior_for(model: nn.Module, prior: PriorForModel | None, refresh: int = 1) -> PriorLike | AdapterPrior | None:
    """The prior as FusedDriftAdamW and attach_prior take it: where the model has LoRA layers, projected onto them."""
    if callable(prior):
        return prior(model)
    if prior is None or isinstance(prior, AdapterPrior) or not _has_lora(model):
        return prior
    from .peft import lora_prior

    return lora_prior(model, prior, refresh=refresh)


def _has_lora(model: nn.Module) -> bool:
    """Whether PEFT has put LoRA layers into it. Without importing PEFT, which then has been."""
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and any(isinstance(module, lora.LoraLayer) for module in model.modules())


_TAKEN = {*inspect.signature(FusedDriftAdamW.__init__).parameters, *inspect.signature(drift_optimizer).parameters}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError for a keyword that `drift_optimizer` would not take: now, not when the optimizer is made."""
    if unknown := sorted(set(options) - _TAKEN):
        raise TypeError(f"FusedDriftAdamW got unexpected keyword arguments: {', '.join(unknown)}")
