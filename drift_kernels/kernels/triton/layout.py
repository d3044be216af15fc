"""The columns of the tables of plan.py and coefficients.py, by name.

Kernels import these one by one, as `tl.constexpr`: only then do their values become part of Triton's cache key, so that
the cache never returns a kernel compiled for another layout.
"""

from __future__ import annotations

from typing import Any

from ...formats import blocks, philox
from ..coefficients import FIELDS
from ..plan import ROW_FIELDS
from .jit import constant


def _column(name: str) -> Any:
    return constant(ROW_FIELDS.index(name))


def _coefficient(name: str) -> Any:
    return constant(FIELDS[name])


ROW = constant(len(ROW_FIELDS))
PARAM = _column("param")
RESIDUAL = _column("residual")
EXP_AVG = _column("exp_avg")
EXP_AVG_SCALE = _column("exp_avg_scale")
EXP_AVG_SQ = _column("exp_avg_sq")
EXP_AVG_SQ_SCALE = _column("exp_avg_sq_scale")
DELTA = _column("delta")
DELTA_SCALE = _column("delta_scale")
NUMEL = _column("numel")
FIRST_CHUNK = _column("first_chunk")
RANDOM_KEY = _column("random_key")
ORIGIN = _column("origin")
WIDTH = _column("width")
PITCH = _column("pitch")

COEFFICIENTS = constant(len(FIELDS))
GRAD_COEF = _coefficient("grad_coef")
DELTA_COEF = _coefficient("delta_coef")
DELTA_STEP = _coefficient("delta_step")
DECAY = _coefficient("decay")
BETA1 = _coefficient("beta1")
ONE_MINUS_BETA1 = _coefficient("one_minus_beta1")
BETA2 = _coefficient("beta2")
ONE_MINUS_BETA2 = _coefficient("one_minus_beta2")
STEP_SIZE = _coefficient("step_size")
INV_SQRT_BC2 = _coefficient("inv_sqrt_bc2")
EPS = _coefficient("eps")
STEP = _coefficient("step")

# Elements that share a scale.
SCALE_BLOCK = constant(blocks.BLOCK)

# The streams of random bits.
PARAM_STREAM = constant(philox.PARAM)
EXP_AVG_STREAM = constant(philox.EXP_AVG)
EXP_AVG_SQ_STREAM = constant(philox.EXP_AVG_SQ)
