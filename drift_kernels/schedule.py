"""Schedules of alpha, in the form of `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

AlphaLambda = Callable[[int], float]


class HasParamGroups(Protocol):
    """An optimizer, or an object that biases gradients for one."""

    param_groups: list[dict[str, Any]]


def linear_anneal(total_steps: int) -> AlphaLambda:
    """Return the factor that falls linearly from 1 at step 0 to 0 at step `total_steps`, and then stays 0.

    At 0 the prior is not read anymore and the step is plain AdamW.

    Args:
        total_steps: number of optimizer steps until the factor is 0.

    Returns:
        A function from the step to the factor, for `AlphaScheduler`.

    Raises:
        ValueError: `total_steps` is not positive.
    """
    if total_steps <= 0:
        raise ValueError(f"total_steps must be positive, got {total_steps}")
    return lambda step: max(0.0, 1.0 - step / total_steps)


class AlphaScheduler:
    """Sets each param group's alpha to its initial alpha times a given function of the step.

    Call `step()` after every `optimizer.step()`, as with a learning rate scheduler. An alpha that is a tensor is filled
    in place, so that a captured CUDA graph sees it.

    Example::

        alpha_schedule = AlphaScheduler(optimizer, linear_anneal(total_steps // 2))
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            alpha_schedule.step()
            optimizer.zero_grad()

    Args:
        optimizer: a `FusedDriftAdamW`, a `GradientBias` or `PriorHooks`: anything with param groups that have an
            `alpha`.
        alpha_lambda: a function from the step to a factor, or one function per param group.
        last_epoch: the last step taken; -1 starts at step 0. Anything else resumes, and needs each group's
            `initial_alpha`.

    Raises:
        ValueError: the number of functions is not that of the param groups, a group has no alpha, or no `initial_alpha`
            when resuming.
    """

    def __init__(
        self, optimizer: HasParamGroups, alpha_lambda: AlphaLambda | Sequence[AlphaLambda], last_epoch: int = -1
    ) -> None:
        groups = optimizer.param_groups
        self.alpha_lambdas = [alpha_lambda] * len(groups) if callable(alpha_lambda) else list(alpha_lambda)
        if len(self.alpha_lambdas) != len(groups):
            raise ValueError(
                f"expected {len(groups)} alpha_lambdas, one per param group, got {len(self.alpha_lambdas)}"
            )
        for index, group in enumerate(groups):
            if "alpha" not in group:
                raise ValueError(
                    f"param group {index} has no alpha: pass a FusedDriftAdamW, a GradientBias or PriorHooks"
                )
            if last_epoch == -1:
                group.setdefault("initial_alpha", float(group["alpha"]))
            elif "initial_alpha" not in group:
                raise ValueError(
                    f"param group {index} has no initial_alpha, which is required to resume at {last_epoch=}"
                )
        self.optimizer = optimizer
        self.base_alphas = [group["initial_alpha"] for group in groups]
        self.last_epoch = last_epoch
        self.step()

    def step(self) -> None:
        """Move to the next step and set alpha for it."""
        self.last_epoch += 1
        for group, base, factor in zip(self.optimizer.param_groups, self.base_alphas, self.alpha_lambdas, strict=True):
            alpha = base * factor(self.last_epoch)
            if isinstance(group["alpha"], Tensor):
                group["alpha"].fill_(alpha)
            else:
                group["alpha"] = alpha

    def get_last_alpha(self) -> list[float]:
        """Return the current alpha of each param group.

        Returns:
            One number per param group.
        """
        return [float(group["alpha"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the initial alphas. The functions are not saved: rebuild them when resuming.

        Returns:
            A dict for `load_state_dict`.
        """
        return {"last_epoch": self.last_epoch, "base_alphas": list(self.base_alphas)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: restore the position and the initial alphas, and set alpha for that step.

        Args:
            state_dict: what `state_dict()` returned.
        """
        self.base_alphas = list(state_dict["base_alphas"])
        self.last_epoch = state_dict["last_epoch"] - 1
        self.step()
