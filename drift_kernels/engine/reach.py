"""What a prior acts on, of the parameters that an optimizer has: said once, and refused where it would be nothing."""

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
    """Whether a parameter takes part in the training, as far as one can tell before the first step."""
    return param.requires_grad or param.grad is not None


def check_reach(prior: Prior, named: Sequence[tuple[str, Tensor]], deltas: Mapping[str, str | Source]) -> None:
    """Raises PriorMismatchError where training with the prior would be plain fine-tuning.

    Args:
        named: every parameter.
        deltas: those that have a delta -> its canonical name, or what it is made of.
    """
    covered = [(name, param) for name, param in named if name in deltas]
    if not any(trains(param) for _, param in covered):
        raise all_frozen([name for name, _ in covered])
    if all_zero({stored: prior.info(stored) for name, _ in covered for stored in stored_names(deltas[name])}):
        raise PriorMismatchError(
            f"the deltas of all {len(covered)} parameters that the prior covers are zero, so it would bias nothing: "
            "the expert that it was built from equals what was subtracted"
        )


def all_frozen(names: Sequence[str]) -> PriorMismatchError:
    """What is raised where these parameters are all that the prior covers, and do not require gradients."""
    return PriorMismatchError(
        f"no parameter that the prior covers requires gradients: all {len(names)} are frozen ({some(names)}), so it "
        "would bias nothing. Unfreeze them (requires_grad_()) before this is made; they may be frozen again until it "
        "is their turn. A prior acts on weights that are trained themselves; for adapters (LoRA) over frozen weights "
        "use drift_kernels.integrations.peft.lora_prior"
    )


def say_reach(named: Sequence[tuple[str, Tensor]], deltas: Mapping[str, str | Source], grown: Sequence[str]) -> None:
    """Logs what the prior acts on: on the first rank for information, on every rank as a warning if part is frozen.

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
        logger.warning("%s; %d that it covers are frozen: %s", message, len(frozen), some(frozen))
    elif not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        logger.info("%s", message)


def _numel(params: Sequence[Tensor]) -> int:
    return sum(param.numel() for param in params)
