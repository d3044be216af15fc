"""The prior as hooks: each gradient is biased in the backward pass, as soon as it is accumulated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .engine.bias import BiasedTogether, BiasSettings, covered
from .engine.binding import PriorBinding, PriorLike
from .errors import PriorMismatchError
from .kernels import backends
from .sharding import is_sharded


class PriorHooks(BiasSettings):
    """What `attach_prior` returns. `alpha` may be set between steps, and `AlphaScheduler` takes it in place of an
    optimizer."""

    def __init__(self, named: list[tuple[str, Tensor]], binding: PriorBinding, settings: BiasSettings, backend: str):
        self.param_groups = settings.param_groups
        self.prior = binding.prior
        self._paused = False
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._biased = {id(param): BiasedTogether([(name, param)], binding, backend) for name, param in named}
        self._hooks: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._bias) for _, param in named
        ]

    def _bias(self, param: Tensor) -> None:
        """The hook. Another that ran before may have taken the gradient."""
        if not self._paused and param.grad is not None:
            with self._lock:
                self._biased[id(param)].apply_(self._hyperparameters([param]))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes in this context leave gradients as they are: for all micro-batches but the last of a step."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Takes the hooks away and lets go of the deltas. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._biased = {}


def attach_prior(
    model: nn.Module,
    prior: PriorLike,
    *,
    alpha: float | Tensor = 1.0,
    scaling: str = "adaptive_cosine",
    normalize_to_param: bool = False,
    prior_device: str | torch.device | None = None,
    backend: str = "auto",
) -> PriorHooks:
    """From now on the backward pass biases each gradient as soon as it is accumulated, in place of the authors' hooks:
    for training loops in which nothing can be called between `backward()` and `optimizer.step()`, or whose gradients
    are gone by then (optimizers that step in the backward pass). Elsewhere `GradientBias` is better: a launch for all
    parameters together, not several for each, and on the gradient that the optimizer reads.

    The hooks bias whatever has been accumulated so far on this process:

    - With accumulation over micro-batches they act in each of them, on the sum so far, unless all but the last run
      `with handle.paused():`. A parameter that the last does not use is then not biased in that step.
    - Before reductions over processes (DDP, DeepSpeed ZeRO 1 and 2), on this process's gradient: with "absolute" the
      reduced gradient is the same as if it had been biased afterwards, with the others c follows from norms and cosines
      of this process. Call this before other hooks are registered (`deepspeed.initialize`): they run in that order.
    - Under a GradScaler, on scaled gradients: "gradnorm" and "adaptive_cosine" do not mind, "absolute" is off by the
      scale.

    Args:
        model: of which the parameters that require gradients now and that the prior covers get a hook. Tied weights are
            one parameter, under the first of their names. Not of DTensors (FSDP2).
        prior, alpha, scaling, normalize_to_param, prior_device, backend: as in `GradientBias`.

    Raises:
        As `GradientBias`, before any hook is registered; PriorMismatchError also if no parameter that is covered
        requires gradients. A sparse gradient of one that is covered raises TypeError in its backward pass.
    """
    settings = BiasSettings(alpha, scaling, normalize_to_param)
    backends.check_name(backend)
    binding = PriorBinding.of(prior, prior_device)
    named = [(name, param) for name, param in covered(model.named_parameters(), binding) if param.requires_grad]
    for name, param in named:
        if is_sharded(param):
            raise TypeError(f"parameter {name} is a DTensor, for which there are no hooks: use GradientBias")
    if not named:
        raise PriorMismatchError("no parameter that the prior covers requires gradients")
    backends.check_devices(backend, [param for _, param in named])
    return PriorHooks(named, binding, settings, backend)
