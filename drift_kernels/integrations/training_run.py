"""One training run, as integrations accompany it: checks, and alpha over time."""

from __future__ import annotations

import math
from typing import Any

from ..schedule import AlphaLambda, AlphaScheduler, linear_anneal
from .in_use import check_in_use
from .settings import check_anneal


class AlphaOverTime:
    """A schedule of alpha that is chosen before the length of the training is known.

    Args:
        alpha_lambda: alpha's factor at each step, as in `AlphaScheduler`.
        anneal: instead, the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].

    Raises:
        ValueError: both are given, or `anneal` is not such a fraction.
    """

    def __init__(self, alpha_lambda: AlphaLambda | None = None, anneal: float | None = None) -> None:
        check_anneal(anneal, alpha_lambda)
        self._alpha_lambda = alpha_lambda
        self._anneal = anneal

    def scheduler(self, optimizer: Any, done: int, total: int) -> AlphaScheduler | None:
        """Return the schedule for a training of known length.

        Args:
            optimizer: as in `AlphaScheduler`.
            done: optimizer steps that are done, when resuming.
            total: optimizer steps of the whole training.

        Returns:
            The scheduler, or None if alpha is constant.
        """
        alpha_lambda = self._alpha_lambda
        if self._anneal is not None:
            alpha_lambda = linear_anneal(max(1, math.ceil(self._anneal * total)))
        if alpha_lambda is None:
            return None
        scheduler = AlphaScheduler(optimizer, alpha_lambda)
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": done})
        return scheduler


class TrainingRun:
    """Checks one training run and schedules alpha. To be made when the training starts.

    Args:
        optimizer: the trainer's optimizer: a `FusedDriftAdamW`, or a wrapper of one.
        alpha: its schedule.
        done: optimizer steps that are done, when resuming.
        total: optimizer steps of the whole training.
        trainer_clips: the norm to which the trainer clips the gradient; 0 or None if it does not.

    Raises:
        TypeError, PriorError: as `check_in_use`.
    """

    def __init__(
        self, optimizer: Any, alpha: AlphaOverTime, done: int, total: int, trainer_clips: float | None = None
    ) -> None:
        self.optimizer = check_in_use(optimizer, trainer_clips)
        self._schedule = alpha.scheduler(self.optimizer, done, total)
        self._has_stepped = False
        self._hook = self.optimizer.register_step_post_hook(self._note)

    def _note(self, *_: Any) -> None:
        self._has_stepped = True
        self._hook.remove()

    def after_step(self) -> None:
        """To be called after each of the trainer's optimizer steps: moves alpha's schedule.

        Raises:
            RuntimeError: the first step was not made by this optimizer.
        """
        if not self._has_stepped:
            raise RuntimeError(
                "the trainer has taken a step, but not with its FusedDriftAdamW: it would train without the prior"
            )
        if self._schedule is not None:
            self._schedule.step()
