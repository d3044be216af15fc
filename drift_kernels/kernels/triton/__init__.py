"""The triton backend: kernels that Triton compiles for the GPU, or runs in its interpreter.

jit       Triton, where it is installed        layout  columns by name
access    rows, coefficients, elements         codes   elements of one byte       random  bits for rounding
update    one kernel                           sums    two                        bias    one
backend   the launches
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
