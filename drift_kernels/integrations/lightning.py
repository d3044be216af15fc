"""For Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..optimizer import FusedDriftAdamW
from ..schedule import AlphaLambda
from .step_figures import step_figures
from .training_run import AlphaOverTime, TrainingRun


class DriftCallback(Callback):
    """Checks that the Trainer steps a `FusedDriftAdamW`, schedules alpha, and logs `step_figures` to the Trainer's
    loggers at every `log_every_n_steps`-th step.

    Example::

        Trainer(callbacks=[DriftCallback(anneal=0.5)])

    Args:
        alpha_lambda: alpha's factor at each step, as in `AlphaScheduler`. A resumed run continues where it was.
        anneal: instead, the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].

    Raises:
        ValueError: both are given, or `anneal` is not such a fraction.
    """

    def __init__(self, alpha_lambda: AlphaLambda | None = None, *, anneal: float | None = None) -> None:
        self._alpha = AlphaOverTime(alpha_lambda, anneal)
        self._run: TrainingRun | None = None
        self._done = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer.

        Args:
            trainer: the Trainer.
            pl_module: its module.

        Raises:
            TypeError: `configure_optimizers` returns no `FusedDriftAdamW`, or several optimizers.
            PriorError: the parameters do not fit the prior.
        """
        if len(trainer.optimizers) != 1:
            kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise TypeError(f"expected one optimizer, a {FusedDriftAdamW.__name__}, got {kinds}")
        self._done = trainer.global_step
        total = int(trainer.estimated_stepping_batches)
        self._run = TrainingRun(trainer.optimizers[0], self._alpha, self._done, total, trainer.gradient_clip_val)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move alpha's schedule after each optimizer step, and log.

        Args:
            trainer: the Trainer.
            pl_module: its module.

        Raises:
            RuntimeError: the first step was not made by the `FusedDriftAdamW`.
        """
        if self._run is None or trainer.global_step == self._done:  # gradients are being accumulated
            return
        self._done = trainer.global_step
        self._run.after_step()
        if self._done % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            figures = step_figures(self._run.optimizer)
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=self._done)
