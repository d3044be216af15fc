"""One training, as the integrations of trainers accompany it: what they check, and alpha over time."""

from __future__ import annotations

import math
from typing import Any

from ..schedule import AlphaLambda, AlphaScheduler, linear_anneal
from .in_use import check_in_use
from .settings import check_anneal


class AlphaOverTime:
    """alpha's schedule, before it is known how long the training is.

    Args:
        alpha_lambda: alpha's factor at each step, as of AlphaScheduler.
        anneal: in place of it, the fraction of the training's steps over which alpha falls linearly to 0, in (0, 1].

    Raises ValueError for both, and for a fraction that is none.
    """

    def __init__(self, alpha_lambda: AlphaLambda | None = None, anneal: float | None = None) -> None:
        check_anneal(anneal, alpha_lambda)
        self._alpha_lambda = alpha_lambda
        self._anneal = anneal

    def scheduler(self, optimizer: Any, done: int, total: int) -> AlphaScheduler | None:
        """For a training of `total` steps that goes on after `done` of them; None if alpha stays as it is."""
        alpha_lambda = self._alpha_lambda
        if self._anneal is not None:
            alpha_lambda = linear_anneal(max(1, math.ceil(self._anneal * total)))
        if alpha_lambda is None:
            return None
        scheduler = AlphaScheduler(optimizer, alpha_lambda)
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": done})
        return scheduler


class TrainingRun:
    """Made where the training begins, with the optimizer as the trainer has it then.

    Args:
        optimizer: a FusedDriftAdamW, or a trainer's wrapper of one.
        alpha: over time.
        done, total: steps of the optimizer.
        trainer_clips: the norm that the trainer clips the gradient to; 0 or None if it does not.

    Raises what `check_in_use` does.
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
        """After each of the trainer's steps. Raises RuntimeError if the first was not this optimizer's."""
        if not self._has_stepped:
            raise RuntimeError(
                "the trainer has taken a step, but not with its FusedDriftAdamW: it would train without the prior"
            )
        if self._schedule is not None:
            self._schedule.step()
