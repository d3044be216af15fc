"""The prior for any optimizer: gradients are biased in place before it reads them.

    g' = g - c*delta        c: as in FusedDriftAdamW, from the same `coefficients.py`

computed in float32 and rounded once to the gradient's dtype (`reference.bias_`). FusedDriftAdamW does not round its
biased gradient, which it never stores.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapters import AdapterPrior
from .deprecation import renamed
from .engine.binding import PriorBinding
from .engine.engine import Engine
from .engine.figures import BiasFigures, bias_figures
from .engine.hyperparameters import check_dtype, hyperparameters
from .engine.reach import all_frozen
from .engine.rules import Bias
from .engine.seen import Seen
from .errors import PriorError
from .kernels import backends
from .kernels.scalings import GRADIENT_SCALINGS, SCALINGS, GradientScaling
from .prior import Prior, PriorLike
from .prior.strengths import AlphaLike, Strengths
from .sharding import is_sharded
from .torch_private import not_compiled

NamedParams = Iterable[tuple[str, Tensor]]

_scaling = renamed("scaling", "prior_scaling")

# What a param group says of AdamW, of which the bias needs nothing.
_NO_STEP: dict[str, Any] = {
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 0.0,
    "weight_decay": 0.0,
    "maximize": False,
    "capturable": False,
}


class BiasSettings:
    """alpha and prior_scaling, in a param group as optimizers have it, so that `AlphaScheduler` takes it for one."""

    def __init__(self, alpha: AlphaLike, prior_scaling: GradientScaling, normalize_to_param: bool) -> None:
        group_alpha, self.strengths = Strengths.split(alpha)
        group = {"alpha": group_alpha, "prior_scaling": prior_scaling, "normalize_to_param": normalize_to_param}
        self.param_groups: list[dict[str, Any]] = [group]
        hyperparameters(self._group([]), 0)

    @property
    def alpha(self) -> float | Tensor:
        """Strength of the prior; may be set between steps."""
        return self.param_groups[0]["alpha"]

    @alpha.setter
    def alpha(self, alpha: float | Tensor) -> None:
        self.param_groups[0]["alpha"] = alpha

    def _group(self, named: list[tuple[str, Tensor]]) -> dict[str, Any]:
        """The param group as an engine takes it, with these parameters."""
        group = self.param_groups[0]
        scaling = group["prior_scaling"]
        if scaling not in GRADIENT_SCALINGS:
            reason = " (it moves parameters, not gradients: use FusedDriftAdamW)" if scaling in SCALINGS else ""
            raise ValueError(f"prior_scaling must be one of {', '.join(GRADIENT_SCALINGS)}, got {scaling!r}{reason}")
        names, params = [name for name, _ in named], [param for _, param in named]
        return {**_NO_STEP, **group, "param_names": names, "params": params}


def _named(named_params: NamedParams) -> list[tuple[str, Tensor]]:
    """Raises PriorError for parameters without names."""
    named = list(named_params)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in named):
        raise PriorError(
            "a prior is bound by parameter name, but these parameters have no names: pass model.named_parameters()"
        )
    return named


def _covered(named: list[tuple[str, Tensor]], binding: PriorBinding) -> list[tuple[str, Tensor]]:
    """The parameters that the prior has a delta for.

    Raises:
        PriorMismatchError: none is covered, only frozen ones are, or one by name but not by shape.
        ValueError: one is given twice.
        TypeError: the gradient of one that is covered cannot be biased.
    """
    names: dict[int, str] = {}
    for name, param in named:
        if id(param) in names:
            raise ValueError(f"{name} and {names[id(param)]} are one parameter: its gradient would be biased twice")
        names[id(param)] = name
    binding.check(named)
    found = [(name, param) for name, param in named if binding.covers(name)]
    for name, param in found:
        check_dtype(name, param)
    return found


class GradientBias(BiasSettings):
    """Biases the gradients of a model by a prior, all together, for any optimizer.

        bias = GradientBias(model.named_parameters(), prior, alpha=0.5)
        loss.backward()
        bias.apply_()
        optimizer.step()

    Call `apply_` once per optimizer step: after gradients are accumulated, reduced over processes and unscaled
    (`GradScaler.unscale_`), before they are clipped. For optimizers that descend. `AlphaScheduler` takes it in place of
    an optimizer.

    Args:
        named_params: `model.named_parameters()`; those without a delta are left alone. Parameters that the prior covers
            are float32, bfloat16 or float16, their gradients of their own dtype or float32 (of float32 ones bfloat16 or
            float16 too), dense, of any strides.
        prior: a `Prior`, the folder of one, or a mapping from parameter names to deltas; bound by name. For LoRA
            adapters what `lora_prior` makes of one (docs/adapters.md). Each delta is loaded once, when its parameter
            first has a gradient.
        alpha: strength of the prior; positive pulls toward the expert, at 0 nothing is done. May be set between steps.
            Or by pattern, as in FusedDriftAdamW: the alpha to be set is then 1, and multiplies these.
        prior_scaling: "absolute", "gradnorm" or "adaptive_cosine" (docs/method.md). ("decoupled" moves parameters, not
            gradients.)
        normalize_to_param: with "absolute", rescale each delta to norm(W), as in FusedDriftAdamW.
        prior_device: "cpu" leaves the deltas of CUDA parameters in pinned host memory; None moves each to its
            parameter's device.
        backend: "auto" or the name of one.

    Raises:
        TypeError, ValueError: an argument or a parameter of a wrong type or value; a parameter that is given twice.
        PriorError: parameters without names; a damaged prior (PriorFormatError); one that matches no parameter, only
            frozen ones, or one by name but not by shape (PriorMismatchError).
        BackendUnavailableError: a backend asked for by name cannot run here.
    """

    @_scaling
    @not_compiled
    def __init__(
        self,
        named_params: NamedParams,
        prior: PriorLike | AdapterPrior,
        *,
        alpha: AlphaLike = 1.0,
        prior_scaling: GradientScaling = "adaptive_cosine",
        normalize_to_param: bool = False,
        prior_device: str | torch.device | None = None,
        backend: backends.Name = "auto",
    ) -> None:
        super().__init__(alpha, prior_scaling, normalize_to_param)
        backends.check_name(backend)
        binding = PriorBinding.of(prior, prior_device, self.strengths)
        self.prior = binding.prior
        self.named_params = _covered(_named(named_params), binding)
        backends.check_devices(backend, [param for _, param in self.named_params])
        self._engine = Engine(Bias(), binding, backend)

    @not_compiled
    @torch.no_grad()
    def apply_(self) -> BiasFigures:
        """Biases every gradient that the prior covers, in place; parameters without a gradient wait.

        Everything is checked before anything changes. Raises TypeError or ValueError for a gradient that is sparse or
        of another dtype, shape or device than it should be, and for an alpha that is not a finite number.
        """
        return bias_figures(self._engine.step([self._group(self.named_params)]))


@_scaling
@not_compiled
@torch.no_grad()
def bias_gradients_(
    named_params: NamedParams,
    prior: Prior,
    alpha: AlphaLike = 1.0,
    prior_scaling: GradientScaling = "adaptive_cosine",
    *,
    normalize_to_param: bool = False,
) -> BiasFigures:
    """`GradientBias(...).apply_()` for parameters and a prior that are the same from step to step.

    What was prepared for them is kept for as long as the prior lives, so deltas are loaded in the first call only, and
    again when other parameters are given; for several models under one prior make a `GradientBias` of each. The
    parameters are not kept alive. alpha, prior_scaling and normalize_to_param may change from call to call. Arguments,
    result and errors are those of `GradientBias`.

    Args:
        prior: a `Prior` (`Prior.open(path)`, `Prior.from_mapping(deltas)`); TypeError for anything else, which would
            have to be loaded in every call.
    """
    if not isinstance(prior, Prior):
        raise TypeError(
            "prior must be a Prior (from Prior.open or Prior.from_mapping), because anything else would be loaded in "
            f"every call, got {type(prior).__name__}"
        )
    settings = BiasSettings(alpha, prior_scaling, normalize_to_param)
    named = _named(named_params)
    prepared = _PREPARED.get(prior)
    if prepared is None or not prepared.fits(named, settings.strengths):
        prepared = _PREPARED[prior] = _Prepared.of(named, prior, settings.strengths)
    covered = [named[i] for i in prepared.covered]
    return bias_figures(prepared.engine.step([settings._group(covered)]))


@dataclass(frozen=True)
class _Prepared:
    """What `bias_gradients_` keeps with a prior, which keeps neither the parameters nor the prior alive."""

    names: list[str]
    params: Seen
    covered: list[int]  # which of them the prior has a delta for
    strengths: Strengths | None
    engine: Engine

    @classmethod
    def of(cls, named: list[tuple[str, Tensor]], prior: Prior, strengths: Strengths | None) -> _Prepared:
        binding = PriorBinding.of(weakref.proxy(prior), None, strengths)
        covered = {name for name, _ in _covered(named, binding)}
        return cls(
            names=[name for name, _ in named],
            params=Seen([param for _, param in named]),
            covered=[i for i, (name, _) in enumerate(named) if name in covered],
            strengths=strengths,
            engine=Engine(Bias(), binding, "auto"),
        )

    def fits(self, named: list[tuple[str, Tensor]], strengths: Strengths | None) -> bool:
        same = self.strengths == strengths and self.names == [name for name, _ in named]
        return same and self.params.are([param for _, param in named])


_PREPARED: weakref.WeakKeyDictionary[Prior, _Prepared] = weakref.WeakKeyDictionary()


class PriorHooks(BiasSettings):
    """What `attach_prior` returns. `alpha` may be set between steps, and `AlphaScheduler` takes it in place of an
    optimizer. `names` are the parameters with a hook; `has_acted` says whether one has biased a gradient."""

    def __init__(self, named: list[tuple[str, Tensor]], binding: PriorBinding, settings: BiasSettings, backend: str):
        self.param_groups = settings.param_groups
        self.prior = binding.prior
        self._paused = False
        self._lock = threading.Lock()  # autograd has a thread for each device
        self.names = [name for name, _ in named]
        self.has_acted = False
        self._engines = {id(param): (name, Engine(Bias(), binding, backend)) for name, param in named}
        self._hooks: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._bias) for _, param in named
        ]

    @not_compiled
    @torch.no_grad()
    def _bias(self, param: Tensor) -> None:
        """The hook. Another that ran before may have taken the gradient."""
        if not self._paused and param.grad is not None:
            with self._lock:
                self.has_acted = True
                name, engine = self._engines[id(param)]
                engine.step([self._group([(name, param)])])

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
        self._engines = {}


@_scaling
@not_compiled
def attach_prior(
    model: nn.Module,
    prior: PriorLike | AdapterPrior,
    *,
    alpha: AlphaLike = 1.0,
    prior_scaling: GradientScaling = "adaptive_cosine",
    normalize_to_param: bool = False,
    prior_device: str | torch.device | None = None,
    backend: backends.Name = "auto",
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
        prior, alpha, prior_scaling, normalize_to_param, prior_device, backend: as in `GradientBias`.

    Raises:
        As `GradientBias`, before any hook is registered. A sparse gradient of one that is covered raises TypeError in
        its backward pass.
    """
    settings = BiasSettings(alpha, prior_scaling, normalize_to_param)
    backends.check_name(backend)
    binding = PriorBinding.of(prior, prior_device, settings.strengths)
    covered = _covered(list(model.named_parameters()), binding)
    named = [(name, param) for name, param in covered if param.requires_grad]
    if not named:
        raise all_frozen([name for name, _ in covered])
    for name, param in named:
        if is_sharded(param):
            raise TypeError(f"hooks do not support DTensors, got parameter {name}: use GradientBias")
    backends.check_devices(backend, [param for _, param in named])
    return PriorHooks(named, binding, settings, backend)
