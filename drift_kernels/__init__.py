"""Fused AdamW that injects a directional prior (DRIFT) into every gradient, in one pass."""

from .errors import BackendUnavailableError, CheckpointError, PriorError, PriorFormatError, PriorMismatchError
from .optimizer import FusedDriftAdamW
from .prior import Coverage, Prior, build_prior
from .schedule import AlphaScheduler, linear_anneal

__version__ = "0.1.0"

__all__ = [
    "AlphaScheduler",
    "BackendUnavailableError",
    "CheckpointError",
    "Coverage",
    "FusedDriftAdamW",
    "Prior",
    "PriorError",
    "PriorFormatError",
    "PriorMismatchError",
    "build_prior",
    "linear_anneal",
]
