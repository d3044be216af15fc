"""Priors: building them from checkpoints, opening them, binding them to a model's parameters by name."""

from ..formats.blocks import BLOCK
from .build import build_prior
from .coverage import Coverage
from .deltas import DeltaInfo
from .names import canonical_name
from .prior import Prior, PriorLike
from .quantized import QuantizedDelta, quantize

__all__ = [
    "BLOCK",
    "Coverage",
    "DeltaInfo",
    "Prior",
    "PriorLike",
    "QuantizedDelta",
    "build_prior",
    "canonical_name",
    "quantize",
]
