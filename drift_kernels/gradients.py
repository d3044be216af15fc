"""The prior for any optimizer: gradients are biased in place (`reference.bias_`) before the optimizer reads them."""

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

# AdamW's hyperparameters, which an engine expects in a param group and the bias does not use.
_NO_STEP: dict[str, Any] = {
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 0.0,
    "weight_decay": 0.0,
    "maximize": False,
    "capturable": False,
}


class BiasSettings:
    """alpha and prior_scaling in a param group, as optimizers hold them, so that `AlphaScheduler` accepts it as an
    optimizer.
    """

    def __init__(self, alpha: AlphaLike, prior_scaling: GradientScaling, normalize_to_param: bool) -> None:
        group_alpha, self.strengths = Strengths.split(alpha)
        group = {"alpha": group_alpha, "prior_scaling": prior_scaling, "normalize_to_param": normalize_to_param}
        self.param_groups: list[dict[str, Any]] = [group]
        hyperparameters(self._group([]), 0)

    @property
    def alpha(self) -> float | Tensor:
        """Strength of the prior, a number or a tensor of one element; may be set between steps."""
        return self.param_groups[0]["alpha"]

    @alpha.setter
    def alpha(self, alpha: float | Tensor) -> None:
        self.param_groups[0]["alpha"] = alpha

    def _group(self, named: list[tuple[str, Tensor]]) -> dict[str, Any]:
        """The param group for an engine, with these parameters."""
        group = self.param_groups[0]
        scaling = group["prior_scaling"]
        if scaling not in GRADIENT_SCALINGS:
            reason = " (it moves parameters, not gradients: use FusedDriftAdamW)" if scaling in SCALINGS else ""
            raise ValueError(f"prior_scaling must be one of {', '.join(GRADIENT_SCALINGS)}, got {scaling!r}{reason}")
        names, params = [name for name, _ in named], [param for _, param in named]
        return {**_NO_STEP, **group, "param_names": names, "params": params}


def _named(named_params: NamedParams) -> list[tuple[str, Tensor]]:
    """The pairs as a list. Raises PriorError for parameters without names."""
    named = list(named_params)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in named):
        raise PriorError(
            "a prior is bound by parameter name, but these parameters have no names: pass model.named_parameters()"
        )
    return named


def _covered(named: list[tuple[str, Tensor]], binding: PriorBinding) -> list[tuple[str, Tensor]]:
    """The parameters that the prior has a delta for. Raises PriorMismatchError if there are none, if all are frozen, or
    if one fits by name but not by shape; ValueError for one that is given twice; TypeError for one whose gradient
    cannot be biased.
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
    """Biases the gradients of a model, all together, for any optimizer that descends.

    Each gradient g of a covered parameter becomes g - c*delta, computed in float32 and rounded once to its dtype, with
    c as in `FusedDriftAdamW` (arXiv 2510.15050; `docs/method.md`).

    Call `apply_` once per optimizer step: after gradients are accumulated, reduced over processes and unscaled
    (`GradScaler.unscale_`), and before they are clipped. `AlphaScheduler` accepts it in place of an optimizer.

    Example::

        bias = GradientBias(model.named_parameters(), prior, alpha=0.5)
        loss.backward()
        bias.apply_()
        optimizer.step()

    Args:
        named_params: `model.named_parameters()`. Parameters without a delta are left alone; covered ones are float32,
            bfloat16 or float16. Their gradients are dense, of any strides, and have the parameter's dtype or float32;
            those of float32 parameters may be bfloat16 or float16.
        prior: a `Prior`, its folder or Hub id, or a mapping from parameter names to deltas; bound by name. For LoRA
            adapters, the result of `lora_prior`. Each delta is loaded once, when its parameter first has a gradient.
        alpha: strength of the prior; positive values pull toward the expert, and 0 leaves gradients as they are. Or by
            pattern, as in `FusedDriftAdamW`: the attribute `alpha` is then 1 and multiplies these.
        prior_scaling: "absolute", "gradnorm" or "adaptive_cosine" (`docs/method.md`). "decoupled" moves parameters, not
            gradients, and is an error.
        normalize_to_param: with "absolute", rescale each delta to norm(W), as in `FusedDriftAdamW`.
        prior_device: "cpu" keeps the deltas of CUDA parameters in pinned host memory; None moves each to its
            parameter's device.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Raises:
        TypeError, ValueError: an argument or parameter has a wrong type or value, or a parameter is given twice.
        PriorError: the parameters have no names, the prior is damaged (`PriorFormatError`), or it matches no parameter,
            only frozen ones, or one by name but not by shape (`PriorMismatchError`).
        BackendUnavailableError: `backend` names one that cannot run here.
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
        """Bias in place every gradient that the prior covers. All checks run before anything changes.

        Parameters without a gradient are skipped.

        Returns:
            The cosines and ratios of the biased tensors, on the device.

        Raises:
            TypeError, ValueError: a gradient is sparse or has a wrong dtype, shape or device, or alpha is not a finite
                number.
            PriorError: a delta cannot be read.
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
    """Bias gradients in place: `GradientBias(...).apply_()` as one function.

    It is meant for parameters and a prior that stay the same from step to step: what it prepares is kept as long as the
    prior lives, so deltas are loaded in the first call only, and again if other parameters are given. For several
    models under one prior, make a `GradientBias` of each. The parameters are not kept alive.

    Args:
        named_params: as in `GradientBias`.
        prior: a `Prior` (`Prior.open(path)`, `Prior.from_mapping(deltas)`).
        alpha, prior_scaling, normalize_to_param: as in `GradientBias`; they may change from call to call.

    Returns:
        The cosines and ratios of the biased tensors, on the device.

    Raises:
        TypeError: `prior` is not a `Prior`: anything else would have to be loaded in every call. Otherwise the errors
            of `GradientBias` and `GradientBias.apply_`.
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
    """What `bias_gradients_` keeps for a prior. It keeps neither the parameters nor the prior alive."""

    names: list[str]
    params: Seen
    covered: list[int]  # indices of those that the prior covers
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
    """The handle that `attach_prior` returns. `AlphaScheduler` accepts it in place of an optimizer.

    Attributes:
        names: names of the parameters that have a hook.
        has_acted: whether a hook has biased a gradient.
        prior: the bound `Prior`.
    """

    def __init__(self, named: list[tuple[str, Tensor]], binding: PriorBinding, settings: BiasSettings, backend: str):
        self.param_groups = settings.param_groups
        self.prior = binding.prior
        self._paused = False
        self._lock = threading.Lock()  # autograd has one thread per device
        self.names = [name for name, _ in named]
        self.has_acted = False
        self._engines = {id(param): (name, Engine(Bias(), binding, backend)) for name, param in named}
        self._hooks: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._bias) for _, param in named
        ]

    @not_compiled
    @torch.no_grad()
    def _bias(self, param: Tensor) -> None:
        """The hook. One that ran before it may have taken the gradient."""
        if not self._paused and param.grad is not None:
            with self._lock:
                self.has_acted = True
                name, engine = self._engines[id(param)]
                engine.step([self._group([(name, param)])])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which backward passes leave gradients unchanged, for all micro-batches but a step's last."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Remove the hooks and release the deltas. A second call does nothing."""
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
    """Register hooks that bias each gradient in the backward pass, as soon as it is accumulated.

    They replace the hooks of the paper's authors, for training loops in which nothing can be called between
    `backward()` and `optimizer.step()`, or whose gradients are gone by then (optimizers that step in the backward
    pass). Elsewhere prefer `GradientBias`: it needs one launch for all parameters instead of several for each, and
    biases the gradient that the optimizer reads.

    Hooks bias whatever this process has accumulated so far. `docs/method.md` explains what that means for accumulation
    over micro-batches (run all but the last inside `paused()`), several processes and a GradScaler. Call this before
    other hooks are registered (`deepspeed.initialize`): they run in that order.

    Args:
        model: parameters that require gradients now and that the prior covers get a hook. Tied weights are one
            parameter, under the first of their names.
        prior, alpha, prior_scaling, normalize_to_param, prior_device, backend: as in `GradientBias`.

    Returns:
        A handle that pauses and removes the hooks and holds `alpha`.

    Raises:
        TypeError: a covered parameter is a DTensor (FSDP2). The errors of `GradientBias` are raised too, always before
            any hook is registered. A sparse gradient of a covered parameter raises in its backward pass.
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
