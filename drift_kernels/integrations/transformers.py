"""For transformers' Trainer and what is built on it, as TRL's SFTTrainer."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optimizer import FusedDriftAdamW
from ..schedule import AlphaLambda, AlphaScheduler
from .named_groups import named_groups
from .step_figures import step_figures, unwrap_optimizer

logger = logging.getLogger("drift_kernels")


def drift_adamw(args: TrainingArguments, model: nn.Module | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for a FusedDriftAdamW whose parameters have their names.

    lr, betas, eps and weight_decay are those of `args`, and as with the Trainer's own optimizers biases and norms do
    not decay; `options` are FusedDriftAdamW's, and go before. One result is for one Trainer.

    Args:
        args: the Trainer's.
        model: the Trainer's. Without it the Trainer says which when it creates the optimizer, as `model_init` needs;
            transformers before 5 cannot.
        options: keyword arguments of FusedDriftAdamW: prior, alpha, max_grad_norm, ... `prior` may be a function of the
            model, for a trainer that puts the adapters into it (TRL's `peft_config`):
            `prior=lambda model: lora_prior(model, "prior")`, without `model` here.
    """
    weight_decay = options.pop("weight_decay", args.weight_decay)
    defaults = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options = {**defaults, **options}
    if model is None:
        return _Factory, {**options, "weight_decay": weight_decay}
    return FusedDriftAdamW, {**_with_prior_for(model, options), "params": named_groups(model, weight_decay)}


def _with_prior_for(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options, where a function of the model in place of the prior has been asked."""
    prior = options.get("prior")
    return {**options, "prior": prior(model)} if callable(prior) else options


class _Factory:
    """transformers 5 calls it without arguments, then what it gets with the model and the options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if args or options:
            raise TypeError("this version of transformers does not tell the model: drift_adamw(args, model, ...)")

    def __call__(self, model: nn.Module, *, weight_decay: float, **options: Any) -> FusedDriftAdamW:
        return FusedDriftAdamW(named_groups(model, weight_decay), **_with_prior_for(model, options))


class DriftCallback(TrainerCallback):
    """Adds the figures of the last step (`step_figures`) to what the Trainer logs of the training, and schedules alpha.

    `Trainer(callbacks=[DriftCallback()])` reaches the console and the Trainer's log history. For trackers (wandb,
    TensorBoard), which the Trainer calls before any callback that it is given: `DriftCallback().add_to(trainer)`.

    Args:
        alpha_lambda: alpha's factor at each step, as of AlphaScheduler. A run that resumes goes on where it was.
    """

    def __init__(self, alpha_lambda: AlphaLambda | None = None) -> None:
        self.alpha_lambda = alpha_lambda
        self._schedule: AlphaScheduler | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Puts it before all other callbacks of the trainer."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Raises TypeError if the Trainer's optimizer is not a FusedDriftAdamW."""
        drift = unwrap_optimizer(optimizer)
        if args.max_grad_norm and drift.max_grad_norm not in (None, math.inf):
            logger.warning(
                "both clip: the Trainer the gradient to max_grad_norm=%g, then FusedDriftAdamW the biased gradient to "
                "max_grad_norm=%g; leave one to do it (TrainingArguments(max_grad_norm=0), or the optimizer's None)",
                args.max_grad_norm,
                drift.max_grad_norm,
            )
        if self.alpha_lambda is not None:
            self._schedule = AlphaScheduler(drift, self.alpha_lambda)
            self._schedule.load_state_dict({**self._schedule.state_dict(), "last_epoch": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._schedule is not None:
            self._schedule.step()

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
            figures = step_figures(optimizer)
            logs.update(figures)
            state.log_history[-1].update(figures)
