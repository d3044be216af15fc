"""The interface of a model's adapters. integrations/peft.py implements it for the layers of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..prior import Prior
from ..prior.names import without_wrappers
from .projection import Factors


class Adapter(Protocol):
    """A LoRA adapter of one weight."""

    @property
    def weight(self) -> str:
        """The live name that the weight would have without the adapter."""

    @property
    def names(self) -> tuple[str, str]:
        """The live names of A and of B."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""

    @property
    def scale(self) -> float:
        """The current factor of B A."""

    @property
    def is_dora(self) -> bool:
        """Whether it is a DoRA adapter, with separate magnitudes for the rows of the weight."""

    def params(self) -> tuple[Tensor, Tensor]:
        """The parameters A and B that the model currently has."""

    def factors(self) -> Factors:
        """The current whole values of A and B, with scale and magnitudes. No host sync."""

    def base_weight(self) -> Tensor:
        """The weight under the adapter in floating point, dequantised if necessary."""


@dataclass(frozen=True)
class AdapterPrior:
    """A prior for a model with adapters. `lora_prior` returns it; pass it to an optimizer as `prior`.

    Attributes:
        prior: the deltas of the weights.
        adapters: the trained adapters.
        renamed: for parameters that are trained in full, a map from live names to the names of the weights.
        refresh: the deltas of adapter parameters are renewed in every `refresh`-th step.
    """

    prior: Prior
    adapters: Sequence[Adapter]
    renamed: Mapping[str, str] = field(default_factory=dict)
    refresh: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.refresh, bool) or not isinstance(self.refresh, int):
            raise TypeError(f"refresh must be an integer number of steps, got {self.refresh!r}")
        if self.refresh < 1:
            raise ValueError(f"refresh must be at least 1 step, got {self.refresh}")

    def adapters_by_name(self) -> dict[str, Adapter]:
        """The adapters by the live names of their A and B, without what wrappers add."""
        return {without_wrappers(name): adapter for adapter in self.adapters for name in adapter.names}

    def renamed_plainly(self) -> dict[str, str]:
        """`renamed`, with keys stripped of what wrappers add."""
        return {without_wrappers(name): weight for name, weight in self.renamed.items()}
