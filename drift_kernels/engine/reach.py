"""The parameters of an optimizer that a prior acts on: logged once, and an error if there are none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from ..errors import PriorMismatchError
from ..prior import Prior
from ..prior.fusion import Source, stored_names
from ..prior.names import some
from ..prior.plausible import all_zero

logger = logging.getLogger("drift_kernels")


def trains(param: Tensor) -> bool:
    """Whether a parameter is trained, as far as can be known before the first step."""
    return param.requires_grad or param.grad is not None


def check_reach(prior: Prior, named: Sequence[tuple[str, Tensor]], deltas: Mapping[str, str | Source]) -> None:
    """Raise PriorMismatchError if the prior would have no effect, so that training would be plain fine-tuning.

    Args:
        named: all parameters.
        deltas: for each parameter with a delta, its canonical name, or the source that it is made from.
    """
    covered = [(name, param) for name, param in named if name in deltas]
    if not any(trains(param) for _, param in covered):
        raise all_frozen([name for name, _ in covered])
    if all_zero({stored: prior.info(stored) for name, _ in covered for stored in stored_names(deltas[name])}):
        raise PriorMismatchError(
            f"the prior would have no effect: the deltas of all {len(covered)} parameters that it covers are zero, "
            "because the expert that it was built from equals the base (or the reference)"
        )


def all_frozen(names: Sequence[str]) -> PriorMismatchError:
    """The error if the prior covers only these parameters, and none of them requires gradients."""
    return PriorMismatchError(
        f"the prior would have no effect: all {len(names)} parameters that it covers are frozen ({some(names)}). "
        "Unfreeze them (requires_grad_()) before you create the optimizer or attach the prior; you may freeze them "
        "again afterwards. For adapters (LoRA) over frozen weights, use drift_kernels.integrations.peft.lora_prior"
    )


def say_reach(named: Sequence[tuple[str, Tensor]], deltas: Mapping[str, str | Source], grown: Sequence[str]) -> None:
    """Log what the prior acts on: on the first rank as information; on every rank as a warning, if part is frozen.

    Args:
        grown: the weights that have more rows than their deltas.
    """
    trained = [(name, param) for name, param in named if trains(param)]
    reached = [param for name, param in trained if name in deltas]
    frozen = [name for name, param in named if name in deltas and not trains(param)]
    message = (
        f"the prior acts on {len(reached)} of {len(trained)} trainable parameters, {_numel(reached):,} of "
        f"{_numel([param for _, param in trained]):,} elements"
    )
    if grown:
        message += f"; tokens were added to {some(grown)}: the delta is zero for them"
    if frozen:
        logger.warning("%s; %d parameters that it covers are frozen: %s", message, len(frozen), some(frozen))
    elif not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        logger.info("%s", message)


def _numel(params: Sequence[Tensor]) -> int:
    return sum(param.numel() for param in params)
