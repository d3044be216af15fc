"""Priors: building them from checkpoints, opening them, binding them to a model's parameters by name."""

from ..formats.blocks import BLOCK
from .build import build_prior
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
    "build_prior",
    "canonical_name",
    "quantize",
]
