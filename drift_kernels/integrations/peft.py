"""For PEFT: a prior for a model with LoRA adapters."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..adapters import AdapterPrior, Factors
from ..errors import PriorError
from ..prior import Prior, PriorLike
from ..prior.names import some
from ..sharding import whole

logger = logging.getLogger("drift_kernels")


def lora_prior(model: nn.Module, prior: PriorLike, *, refresh: int = 1) -> AdapterPrior:
    """Return a prior for a model whose adapters are trained, for `FusedDriftAdamW`, `GradientBias` and `attach_prior`.

    Each delta is projected onto the two factors of its adapter, W = W0 + s*B A (`docs/adapters.md`). The projections
    follow A and B as they change. With DoRA, A and B are pulled and the magnitudes are not. Parameters that are trained
    in full beside the adapters (`modules_to_save`, biases) use their deltas as they are.

    Example::

        optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, "prior"))

    Args:
        model: with its adapters, of which the currently active ones are used. Any model that PEFT has added LoRA layers
            to, a PeftModel or not, its base quantised or not. It is not kept alive.
        prior: a `Prior`, its folder or Hub id, or a mapping from names of weights to deltas. Low-rank deltas are never
            expanded, others tile by tile.
        refresh: renew the projections in every `refresh`-th step (`docs/adapters.md` has the cost). Those of a frozen A
            are made once.

    Returns:
        A prior that is bound to the model's adapters.

    Raises:
        PriorError: the model has no active LoRA adapter.
        TypeError, ValueError: `refresh` is not a positive integer, or `prior` is not a prior.
    """
    adapters: list[_LoRA] = []
    renamed: dict[str, str] = {}
    left_out: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for key in module.active_adapters:
                if key in module.lora_A or key in module.lora_embedding_A:
                    if (reason := _reason_against(module, key)) is None:
                        adapters.append(_LoRA(name, module, key))
                    else:
                        left_out.append(f"{name} ({reason})")
            renamed |= dict(_trained_parts(name, module))
        elif isinstance(module, ModulesToSaveWrapper):
            renamed |= dict(_renamed_copies(name, module))
    if left_out:
        logger.warning("the prior does not act on %d adapters: %s", len(left_out), some(left_out))
    if not adapters:
        raise PriorError(
            "the model has no active LoRA adapter that a prior could be projected onto"
            + (f" (left out: {some(left_out)})" if left_out else "")
            + "; to train weights directly, pass the prior itself"
        )
    return AdapterPrior(Prior.of(prior), adapters, renamed, refresh)


def _reason_against(layer: Any, key: str) -> str | None:
    """Why no delta can be projected onto this adapter; None if one can."""
    variant = type(getattr(layer, "lora_variant", {}).get(key)).__name__
    if variant not in ("NoneType", "DoraLinearVariant"):
        return variant
    if _is_dora(layer, key) and layer.fan_in_fan_out:
        return "DoRA of a transposed weight"
    if key in layer.lora_embedding_A:
        return None
    if not isinstance(layer.lora_A[key], nn.Linear) or not hasattr(layer.get_base_layer(), "weight"):
        return type(layer).__name__
    return None


def _is_dora(layer: Any, key: str) -> bool:
    return key in getattr(layer, "lora_magnitude_vector", {})


def _trained_parts(name: str, layer: Any) -> Iterator[tuple[str, str]]:
    """The parts of the layer that are trained beside the adapters: biases."""
    for part, param in layer.base_layer.named_parameters():
        if param.requires_grad and part != "weight":
            yield f"{name}.base_layer.{part}", f"{name}.{part}"


def _renamed_copies(name: str, wrapper: Any) -> Iterator[tuple[str, str]]:
    for key in wrapper.active_adapters:
        if key in wrapper.modules_to_save:
            for part, _ in wrapper.modules_to_save[key].named_parameters():
                yield f"{name}.modules_to_save.{key}.{part}", f"{name}.{part}"


class _LoRA:
    """An `Adapter` for a PEFT layer, which it does not keep alive."""

    def __init__(self, name: str, layer: Any, key: str) -> None:
        self._layer, self._key = weakref.ref(layer), key
        self._of_embedding = key in layer.lora_embedding_A
        self.weight = f"{name}.weight"
        kind, suffix = ("lora_embedding", "") if self._of_embedding else ("lora", ".weight")
        self.names = f"{name}.{kind}_A.{key}{suffix}", f"{name}.{kind}_B.{key}{suffix}"
        self._transposed = self._of_embedding or bool(getattr(layer, "fan_in_fan_out", False))
        a, b = self.params()
        columns, rows = a.shape[1], b.shape[0]
        self.shape = (columns, rows) if self._transposed else (rows, columns)

    def __reduce__(self) -> Any:
        raise TypeError("a prior for the adapters of a model cannot be pickled: call lora_prior again")

    def params(self) -> tuple[Tensor, Tensor]:
        layer = self._found()
        if self._of_embedding:
            return layer.lora_embedding_A[self._key], layer.lora_embedding_B[self._key]
        return layer.lora_A[self._key].weight, layer.lora_B[self._key].weight

    @property
    def scale(self) -> float:
        return float(self._found().scaling[self._key])

    @property
    def is_dora(self) -> bool:
        return _is_dora(self._found(), self._key)

    def factors(self) -> Factors:
        a, b = (whole(param.detach()) for param in self.params())
        factors = Factors(a, b, self.scale, transposed=self._transposed)
        if not self.is_dora:
            return factors
        # As in DoRA's forward pass: the magnitude replaces the norm of each row of W0 + s*B A.
        dtype = factors.dtype
        direction = torch.addmm(self.base_weight().to(dtype), b.to(dtype), a.to(dtype), alpha=factors.scale)
        magnitude = whole(self._found().lora_magnitude_vector[self._key].weight.detach()).to(dtype)
        return replace(factors, row_scale=magnitude / torch.linalg.vector_norm(direction, dim=1))

    def base_weight(self) -> Tensor:
        return whole(dequantize_module_weight(self._found().get_base_layer()).detach())

    def _found(self) -> Any:
        layer = self._layer()
        if layer is None:
            raise PriorError(
                f"the model with the adapter of {self.weight} no longer exists: call lora_prior for the current one"
            )
        return layer
