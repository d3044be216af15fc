"""For transformers' Trainer under DeepSpeed: ZeRO flattens the parameters, so no optimizer sees their names. Instead,
hooks bias the gradients in the backward pass, and the Trainer's own AdamW reads them.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch.distributed as dist
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..gradients import PriorHooks, attach_prior
from ..schedule import AlphaScheduler
from .for_model import PriorForModel, prior_for
from .transformers import DriftCallback

logger = logging.getLogger("drift_kernels")

_OPTIONS = ("alpha", "prior_scaling", "normalize_to_param", "prior_device", "backend")


def use_hooks(
    trainer: Trainer, *, prior: PriorForModel, anneal: float | None = None, refresh: int = 1, **options: Any
) -> PriorHooks:
    """Make a Trainer under DeepSpeed (ZeRO 1 or 2) train with a prior. Call it after the Trainer is made and before
    `trainer.train()`.

    `attach_prior` biases this process's gradients before they are reduced, and DeepSpeed clips the result to
    `args.max_grad_norm`. The optimizer is the one that the Trainer makes, or that DeepSpeed's configuration names.

    Args:
        trainer: a Trainer with `args.deepspeed`, and its model as it is trained.
        prior: as in `drift_optimizer`.
        anneal: the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].
        refresh: as in `lora_prior`.
        options: alpha, prior_scaling, normalize_to_param, prior_device and backend, as in `attach_prior`.

    Returns:
        The handle of the hooks.

    Raises:
        ValueError: ZeRO 3, which partitions the parameters; an option that only `FusedDriftAdamW` has; or micro-batches
            in which hooks would bias a step several times.
        TypeError, PriorError, BackendUnavailableError: as `attach_prior`.
    """
    if unfit := sorted(set(options) - set(_OPTIONS)):
        raise ValueError(
            f"under DeepSpeed the prior acts through hooks, which do not support {', '.join(unfit)}: leave them out, "
            "or train without DeepSpeed (DDP, FSDP2)"
        )
    stage = trainer.args.deepspeed_plugin.zero_stage
    if stage == 3:
        raise ValueError("ZeRO 3 partitions the parameters before the prior is bound: use ZeRO 2 (or FSDP2)")
    _check_micro_batches(trainer.args, stage, options.get("prior_scaling"))
    model: Any = trainer.model
    hooks = attach_prior(model, cast(Any, prior_for(model, prior, refresh)), **options)
    if not (dist.is_initialized() and dist.get_rank()):
        logger.info(
            "DeepSpeed (ZeRO %d) removes the names of parameters: hooks bias %d gradients in the backward pass, and "
            "the Trainer creates the optimizer",
            stage,
            len(hooks.names),
        )
    _HooksCallback(hooks, anneal).add_to(trainer)
    return hooks


def _check_micro_batches(args: TrainingArguments, stage: int, scaling: str | None) -> None:
    """ZeRO 2 removes each micro-batch's gradient after its hooks; ZeRO 1 keeps it to be added to."""
    if args.gradient_accumulation_steps > 1 and (stage != 2 or scaling == "absolute"):
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: hooks act in every micro-batch, so with "
            f"ZeRO {stage} and prior_scaling={scaling or 'adaptive_cosine'!r} they would bias a step several times: "
            "use 1, or ZeRO 2 with 'gradnorm' or 'adaptive_cosine', which scale with each micro-batch's gradient"
        )


class _HooksCallback(DriftCallback):
    """Schedules alpha, logs it, and checks that the hooks act."""

    def __init__(self, hooks: PriorHooks, anneal: float | None) -> None:
        super().__init__(anneal=anneal)
        self.hooks = hooks
        self._schedule: AlphaScheduler | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        self._schedule = self._alpha.scheduler(self.hooks, state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.hooks.has_acted:
            raise RuntimeError(
                "the trainer has taken a step in which no hook of the prior acted: it would train without the prior"
            )
        if self._schedule is not None:
            self._schedule.step()

    def _figures(self, optimizer: Any) -> dict[str, float]:
        return {"prior/alpha": float(self.hooks.alpha), "prior/bound": len(self.hooks.names)}
