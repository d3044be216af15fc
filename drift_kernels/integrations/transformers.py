"""For transformers' Trainer and what is built on it, as TRL's SFTTrainer."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optimizer import FusedDriftAdamW
from ..prior import Prior
from ..schedule import AlphaLambda
from .for_model import PriorForModel, check_options, drift_optimizer
from .step_figures import step_figures
from .training_run import AlphaOverTime, TrainingRun

logger = logging.getLogger("drift_kernels")

# What TrainingArguments(optim=...) is where nobody has said anything.
_UNASKED = ("adamw_torch", "adamw_torch_fused")


def use_drift(
    trainer: Trainer,
    *,
    prior: PriorForModel | None,
    alpha_lambda: AlphaLambda | None = None,
    anneal: float | None = None,
    **options: Any,
) -> None:
    """Has a Trainer train with a FusedDriftAdamW: to be called after it is made, before `trainer.train()`.

        trainer = Trainer(model, args, train_dataset=dataset)
        use_drift(trainer, prior="prior")
        trainer.train()

    lr, betas, eps and weight_decay are those of the Trainer's arguments; biases and norms do not decay. The optimizer
    takes the clipping over: it clips the biased gradient to `args.max_grad_norm`, which becomes 0, unless `options`
    have a `max_grad_norm` (None leaves the clipping to the Trainer). A `DriftCallback` is put before all other
    callbacks.

    Args:
        trainer: transformers' Trainer, or one built on it that leaves the choice of the optimizer to it, as TRL's.
        prior: as in `drift_optimizer`; None for plain AdamW.
        alpha_lambda, anneal: alpha over time, as in DriftCallback.
        options: what else `drift_optimizer` takes: alpha, prior_scaling, anchor, ...

    Raises:
        ValueError: the Trainer has an optimizer already, is to make another one, or uses DeepSpeed.
        TypeError: an option that nothing takes.
        PriorError: a damaged prior, or none where it should be.
        What else FusedDriftAdamW raises comes when the Trainer makes it, at the beginning of `train()`.
    """
    check_free(trainer)
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed's ZeRO flattens parameters, which loses their names: use "
            "drift_kernels.integrations.hooked.use_hooks(trainer, prior=...), which biases the gradients before that"
        )
    check_options(options)
    callback = DriftCallback(alpha_lambda, anneal=anneal)
    options["prior"] = Prior.of(prior) if isinstance(prior, (str, os.PathLike)) else prior
    if "max_grad_norm" not in options and trainer.args.max_grad_norm:
        options["max_grad_norm"] = trainer.args.max_grad_norm
        trainer.args.max_grad_norm = 0
    trainer.optimizer_cls_and_kwargs = drift_adamw(trainer.args, trainer.model, **options)
    callback.add_to(trainer)


def check_free(trainer: Trainer) -> None:
    """Raises ValueError if the Trainer has, or was asked for, an optimizer that ours would take the place of."""
    if trainer.optimizer is not None:
        raise ValueError(
            f"the Trainer already has an optimizer ({type(trainer.optimizer).__name__}): leave out `optimizers`, and "
            "call this before trainer.train()"
        )
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        raise ValueError("the Trainer already has optimizer_cls_and_kwargs: leave them out")
    asked = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if asked not in _UNASKED:
        raise ValueError(f"the arguments have optim={asked!r}, but FusedDriftAdamW would replace it: leave it out")


def drift_adamw(args: TrainingArguments, model: nn.Module | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for a FusedDriftAdamW whose parameters have their names.

    lr, betas, eps and weight_decay are those of `args`, and as with the Trainer's own optimizers biases and norms do
    not decay; `options` go before. One result is for one Trainer.

    Args:
        args: the Trainer's.
        model: the Trainer's, with its adapters; for transformers 4, whose Trainer does not say it.
        options: those of `drift_optimizer`: prior, alpha, max_grad_norm, ...
    """
    defaults = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    named = {} if model is None else {"model": model}
    return _OptimizerOfModel, {**defaults, "weight_decay": args.weight_decay, **options, **named}


class _OptimizerOfModel:
    """transformers 5 makes one and calls it with the model that it trains (axolotl also with its arguments);
    transformers 4 calls the class with the option `model`, or without one with param groups."""

    def __new__(cls, *model: Any, **options: Any) -> Any:
        if not model:
            return super().__new__(cls)
        if not isinstance(model[0], nn.Module):
            raise TypeError("this version of transformers does not pass the model: use drift_adamw(args, model, ...)")
        return drift_optimizer(model[0], **options)

    def __call__(self, trained: nn.Module, *_: Any, model: nn.Module | None = None, **options: Any) -> FusedDriftAdamW:
        return drift_optimizer(trained, **options)


class DriftCallback(TrainerCallback):
    """Checks that the Trainer steps a FusedDriftAdamW, adds the figures of the last step (`step_figures`) to what it
    logs of the training, and schedules alpha.

    `DriftCallback().add_to(trainer)`, which `use_drift` does, reaches everything that the Trainer logs to.
    `Trainer(callbacks=[DriftCallback()])` reaches the console and the log history, but not trackers (wandb,
    TensorBoard, ...), which the Trainer calls before any callback that it is given: that is a warning.

    Args:
        alpha_lambda: alpha's factor at each step, as of AlphaScheduler. A run that resumes goes on where it was.
        anneal: in place of it, the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].
    """

    def __init__(self, alpha_lambda: AlphaLambda | None = None, *, anneal: float | None = None) -> None:
        self._alpha = AlphaOverTime(alpha_lambda, anneal)
        self._is_first = False
        self._run: TrainingRun | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Puts it before all other callbacks of the trainer."""
        self._is_first = True
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Raises TypeError if the Trainer's optimizer is not a FusedDriftAdamW, and PriorError if its parameters do not
        fit the prior."""
        self._run = TrainingRun(optimizer, self._alpha, state.global_step, state.max_steps, args.max_grad_norm)
        if args.report_to and not self._is_first:
            logger.warning(
                "%s will not log the statistics of the prior, because these are added too late: use "
                "use_drift(trainer, ...) or DriftCallback().add_to(trainer)",
                ", ".join(args.report_to),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._run is not None:
            self._run.after_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if logs is not None and "loss" in logs:  # neither an evaluation nor the summary of the run
            figures = self._figures(optimizer)
            logs.update(figures)
            state.log_history[-1].update(figures)

    def _figures(self, optimizer: Any) -> dict[str, float]:
        return step_figures(optimizer)
