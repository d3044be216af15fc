"""For transformers' Trainer and trainers based on it, such as TRL's SFTTrainer."""

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

# The defaults of TrainingArguments(optim=...).
_UNASKED = ("adamw_torch", "adamw_torch_fused")


def use_drift(
    trainer: Trainer,
    *,
    prior: PriorForModel | None,
    alpha_lambda: AlphaLambda | None = None,
    anneal: float | None = None,
    **options: Any,
) -> None:
    """Make a Trainer train with a `FusedDriftAdamW`. Call it after the Trainer is made and before `trainer.train()`.

    lr, betas, eps and weight_decay come from the Trainer's arguments; biases and norms do not decay. The optimizer also
    takes over clipping: it clips the biased gradient to `args.max_grad_norm`, which is set to 0, unless `options`
    contain `max_grad_norm` (None leaves clipping to the Trainer). A `DriftCallback` is put before all other callbacks.

    Example::

        trainer = Trainer(model, args, train_dataset=dataset)
        use_drift(trainer, prior="prior", anneal=0.5)
        trainer.train()

    Args:
        trainer: a Trainer, or one based on it that leaves the choice of the optimizer to it, such as TRL's.
        prior: as in `drift_optimizer`; None for plain AdamW.
        alpha_lambda: alpha's factor at each step, as in `AlphaScheduler`.
        anneal: instead, the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].
        options: other arguments of `drift_optimizer`: alpha, prior_scaling, anchor, ...

    Raises:
        ValueError: the Trainer has an optimizer already, is set to make another one, or uses DeepSpeed; or the schedule
            of alpha is invalid.
        TypeError: an unknown option.
        PriorError: the prior cannot be opened. Other errors of `FusedDriftAdamW` are raised when the Trainer makes it,
            at the start of `train()`.
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
    """Check that the choice of the optimizer is free.

    Args:
        trainer: the Trainer.

    Raises:
        ValueError: the Trainer has an optimizer, or was told to make one, that `FusedDriftAdamW` would replace.
    """
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
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes, for a `FusedDriftAdamW` with named parameters.

    lr, betas, eps and weight_decay come from `args`, unless `options` contain them. As with the Trainer's own
    optimizers, biases and norms do not decay. Use each result for one Trainer only.

    Args:
        args: the Trainer's arguments.
        model: the Trainer's model, with its adapters. Needed with transformers 4, whose Trainer does not pass it.
        options: arguments of `drift_optimizer`: prior, alpha, max_grad_norm, ...
    """
    defaults = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    named = {} if model is None else {"model": model}
    return _OptimizerOfModel, {**defaults, "weight_decay": args.weight_decay, **options, **named}


class _OptimizerOfModel:
    """transformers 5 makes one and calls it with the model that it trains (axolotl also with its arguments);
    transformers 4 calls the class with the option `model`, or without one with param groups.
    """

    def __new__(cls, *model: Any, **options: Any) -> Any:
        if not model:
            return super().__new__(cls)
        if not isinstance(model[0], nn.Module):
            raise TypeError("this version of transformers does not pass the model: use drift_adamw(args, model, ...)")
        return drift_optimizer(model[0], **options)

    def __call__(self, trained: nn.Module, *_: Any, model: nn.Module | None = None, **options: Any) -> FusedDriftAdamW:
        return drift_optimizer(trained, **options)


class DriftCallback(TrainerCallback):
    """Checks that the Trainer steps a `FusedDriftAdamW`, schedules alpha, and adds `step_figures` to what the Trainer
    logs.

    `DriftCallback().add_to(trainer)`, which `use_drift` does, reaches everything that the Trainer logs to.
    `Trainer(callbacks=[DriftCallback()])` reaches the console and the log history, but not trackers (wandb,
    TensorBoard, ...), which the Trainer calls before any callback that it is given; this logs a warning.

    Args:
        alpha_lambda: alpha's factor at each step, as in `AlphaScheduler`. A resumed run continues where it was.
        anneal: instead, the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].

    Raises:
        ValueError: both are given, or `anneal` is not such a fraction.
    """

    def __init__(self, alpha_lambda: AlphaLambda | None = None, *, anneal: float | None = None) -> None:
        self._alpha = AlphaOverTime(alpha_lambda, anneal)
        self._is_first = False
        self._run: TrainingRun | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Put the callback before all others of the trainer.

        Args:
            trainer: the Trainer.
        """
        self._is_first = True
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Check the optimizer.

        Args:
            args, state, control, optimizer: as the Trainer passes them.

        Raises:
            TypeError: the Trainer's optimizer is not a `FusedDriftAdamW`.
            PriorError: its parameters do not fit the prior.
        """
        self._run = TrainingRun(optimizer, self._alpha, state.global_step, state.max_steps, args.max_grad_norm)
        if args.report_to and not self._is_first:
            logger.warning(
                "%s will not log the statistics of the prior, because these are added too late: use "
                "use_drift(trainer, ...) or DriftCallback().add_to(trainer)",
                ", ".join(args.report_to),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move alpha's schedule.

        Args:
            args, state, control: as the Trainer passes them.

        Raises:
            RuntimeError: the first step was not made by the `FusedDriftAdamW`.
        """
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
        """Add the figures of the last step to a log of the training loss.

        Args:
            args, state, control, logs, optimizer: as the Trainer passes them.
        """
        if logs is not None and "loss" in logs:  # not an evaluation or the summary of the run
            figures = self._figures(optimizer)
            logs.update(figures)
            state.log_history[-1].update(figures)

    def _figures(self, optimizer: Any) -> dict[str, float]:
        return step_figures(optimizer)
