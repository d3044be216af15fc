"""Priors: building them from checkpoints, opening them, and matching them with a model's parameters by name."""

from ..formats.blocks import BLOCK
from .apply import apply_prior
from .build import build_prior
from .combine import combine_priors
from .coverage import Coverage
from .deltas import Delta
from .low_rank import LowRankDelta
from .names import canonical_name
from .prior import Prior, PriorLike
from .quantized import QuantizedDelta, quantize
from .record import DeltaInfo
from .verification import Verification

__all__ = [
    "BLOCK",
    "Coverage",
    "Delta",
    "DeltaInfo",
    "LowRankDelta",
    "Prior",
    "PriorLike",
    "QuantizedDelta",
    "Verification",
    "apply_prior",
    "build_prior",
    "canonical_name",
    "combine_priors",
    "quantize",
]
