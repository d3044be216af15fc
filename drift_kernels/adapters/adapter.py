"""What the engine must know of a model's adapters. integrations/peft.py finds them in PEFT's layers."""

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
        """The live name of the weight, as if it were trained itself."""

    @property
    def names(self) -> tuple[str, str]:
        """The live names of A and of B."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by, now."""

    @property
    def is_dora(self) -> bool:
        """Whether the rows of the weight have magnitudes of their own."""

    def params(self) -> tuple[Tensor, Tensor]:
        """A and B, the parameters that the model has now."""

    def factors(self) -> Factors:
        """Their values now, whole, and what goes with them. Nothing of it is read by the host."""

    def base_weight(self) -> Tensor:
        """The weight under the adapter, in floating point; a quantised one expanded."""


@dataclass(frozen=True)
class AdapterPrior:
    """A prior for a model with adapters: what `lora_prior` returns, and optimizers take as `prior`.

    Attributes:
        prior: deltas of the weights.
        adapters: those that are trained.
        renamed: live names of parameters that are trained in full beside them, to those of the weights that they are.
        refresh: the deltas of the adapters' parameters are renewed in every `refresh`-th step.
    """

    prior: Prior
    adapters: Sequence[Adapter]
    renamed: Mapping[str, str] = field(default_factory=dict)
    refresh: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.refresh, bool) or not isinstance(self.refresh, int):
            raise TypeError(f"refresh must be a number of steps, got {self.refresh!r}")
        if self.refresh < 1:
            raise ValueError(f"refresh must be at least 1 step, got {self.refresh}")

    def adapters_by_name(self) -> dict[str, Adapter]:
        """Each adapter by the live names of A and of B, without what wrappers add."""
        return {without_wrappers(name): adapter for adapter in self.adapters for name in adapter.names}

    def renamed_plainly(self) -> dict[str, str]:
        """`renamed`, whose keys are without what wrappers add."""
        return {without_wrappers(name): weight for name, weight in self.renamed.items()}
