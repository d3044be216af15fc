"""Fused AdamW that injects a directional prior (DRIFT) into every gradient, in one pass."""

from .engine.figures import BiasFigures
from .errors import BackendUnavailableError, CheckpointError, PriorError, PriorFormatError, PriorMismatchError
from .gradients import GradientBias, PriorHooks, attach_prior, bias_gradients_
from .messages import set_up
from .optimizer import FusedDriftAdamW
from .prior import Coverage, Prior, apply_prior, build_prior, combine_priors
from .schedule import AlphaScheduler, linear_anneal
from .version import __version__

set_up()

__all__ = [
    "AlphaScheduler",
    "BackendUnavailableError",
    "BiasFigures",
    "CheckpointError",
    "Coverage",
    "FusedDriftAdamW",
    "GradientBias",
    "Prior",
    "PriorError",
    "PriorFormatError",
    "PriorHooks",
    "PriorMismatchError",
    "__version__",
    "apply_prior",
    "attach_prior",
    "bias_gradients_",
    "build_prior",
    "combine_priors",
    "linear_anneal",
]
