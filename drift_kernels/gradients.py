"""The prior for any optimizer: gradients are biased in place before it reads them.

    g' = g - c*delta        c: as in FusedDriftAdamW, from the same `coefficients.py`

computed in float32 and rounded once to the gradient's dtype (`reference.bias_`). FusedDriftAdamW does not round its
biased gradient, which it never stores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .engine.bias import BiasedTogether, BiasFigures, BiasSettings, NamedParams, covered
from .engine.binding import PriorBinding, PriorLike
from .kernels import backends
from .prior import Prior


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
            are float32, bfloat16 or float16, their gradients of their own dtype or float32, dense, of any strides.
        prior: a `Prior`, the folder of one, or a mapping from parameter names to deltas; bound by name. Each delta is
            loaded once, when its parameter first has a gradient.
        alpha: strength of the prior; positive pulls toward the expert, at 0 nothing is done. May be set between steps.
        scaling: "absolute", "gradnorm" or "adaptive_cosine" (docs/method.md). ("decoupled" moves parameters, not
            gradients.)
        normalize_to_param: with "absolute", rescale each delta to norm(W), as in FusedDriftAdamW.
        prior_device: "cpu" leaves the deltas of CUDA parameters in pinned host memory; None moves each to its
            parameter's device.
        backend: "auto" or the name of one.

    Raises:
        TypeError, ValueError: an argument or a parameter of a wrong type or value; a parameter that is given twice.
        PriorError: parameters without names; a damaged prior (PriorFormatError); one that matches no parameter, or
            matches by name but not by shape (PriorMismatchError).
        BackendUnavailableError: a backend asked for by name cannot run here.
    """

    def __init__(
        self,
        named_params: NamedParams,
        prior: PriorLike,
        *,
        alpha: float | Tensor = 1.0,
        scaling: str = "adaptive_cosine",
        normalize_to_param: bool = False,
        prior_device: str | torch.device | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(alpha, scaling, normalize_to_param)
        backends.check_name(backend)
        binding = PriorBinding.of(prior, prior_device)
        self.prior = binding.prior
        self.named_params = covered(named_params, binding)
        backends.check_devices(backend, [param for _, param in self.named_params])
        self._biased = BiasedTogether(self.named_params, binding, backend)

    def apply_(self) -> BiasFigures:
        """Biases every gradient that the prior covers, in place; parameters without a gradient wait.

        Everything is checked before anything changes. Raises TypeError or ValueError for a gradient that is sparse or
        of another dtype, shape or device than it should be, and for an alpha that is not a finite number.
        """
        return self._biased.apply_(self._hyperparameters([param for _, param in self.named_params[:1]]))


def bias_gradients_(
    named_params: NamedParams,
    prior: Prior,
    alpha: float | Tensor = 1.0,
    scaling: str = "adaptive_cosine",
    *,
    normalize_to_param: bool = False,
) -> BiasFigures:
    """`GradientBias(...).apply_()` for parameters and a prior that are the same from step to step.

    What was prepared for them is kept with the prior, so deltas are loaded in the first call only, and again when other
    parameters are given; for several models under one prior make a `GradientBias` of each. alpha, scaling and
    normalize_to_param may change from call to call. Arguments, result and errors are those of `GradientBias`.

    Args:
        prior: a `Prior` (`Prior.open(path)`, `Prior.from_mapping(deltas)`); TypeError for anything else, which would
            have to be loaded in every call.
    """
    if not isinstance(prior, Prior):
        raise TypeError(
            f"prior must be a Prior, which is loaded once (Prior.open, Prior.from_mapping), got {type(prior).__name__}"
        )
    settings = BiasSettings(alpha, scaling, normalize_to_param)
    named = list(named_params)
    kept: tuple[list[Any], GradientBias] | None = vars(prior).get(_KEPT)
    if kept is None or not _same(kept[0], named):
        kept = named, GradientBias(named, prior)
        setattr(prior, _KEPT, kept)
    kept[1].param_groups = settings.param_groups
    return kept[1].apply_()


_KEPT = "_kept_gradient_bias"  # the attribute of a prior


def _same(before: list[Any], named: list[Any]) -> bool:
    return len(before) == len(named) and all(
        isinstance(new, tuple) and old[0] == new[0] and old[1] is new[1] for old, new in zip(before, named, strict=True)
    )
