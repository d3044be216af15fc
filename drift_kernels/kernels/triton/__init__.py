"""The triton backend: kernels that Triton compiles for the GPU, or runs in its interpreter.

jit, layout       Triton, where it is installed; columns by their names
access, codes     how kernels reach rows, coefficients and elements; elements of one byte
random            bits for rounding
update            one kernel; likewise bias, and sums with two
backend           the launches
"""

from .backend import (
    BIAS_BLOCK,
    CAPTURABLE,
    OPTIONS,
    STATS_BLOCK,
    TOTAL_BLOCK,
    UPDATE_BLOCK,
    bias,
    grad_stats,
    unavailable,
    unsuitable,
    update,
)

__all__ = [
    "BIAS_BLOCK",
    "CAPTURABLE",
    "OPTIONS",
    "STATS_BLOCK",
    "TOTAL_BLOCK",
    "UPDATE_BLOCK",
    "bias",
    "grad_stats",
    "unavailable",
    "unsuitable",
    "update",
]
