"""The quick root and quotient of the cuda backend's kernels: where they are used, and that they are exact there."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from functools import cache
from pathlib import Path

import grid
import numpy as np
import pytest
import torch
from background import OUT, Product
from problems import BF16, DEVICE, F32, GRID, Problem, assert_same_bits, coefficients, with_rare_values

from drift_kernels.kernels import backends
from drift_kernels.kernels.coefficients import Coefficients

FLAGS = "-std=c++17 -O2 -shared -fPIC -ffp-contract=off"
SOURCE = Path(__file__).with_name("quotient.cpp")
LIBRARY = Product("quotient.so", [str(grid.COMPILER), *FLAGS.split(), SOURCE, "-o", OUT])
pytestmark = pytest.mark.skipif(grid.COMPILER is None, reason="there is no C++ compiler")

# Just inside and just outside, with both signs where a sign may be.
PARAMS = [0.0, -0.0, 1e-40, -1.9999, 2.0, -2.0, 3.3e38, math.inf, -math.inf, math.nan]
MOMENTS = [0.0, -0.0, 2.0**-63, -(2.0**-63), 2.0**-64, 1.9999, -1.9999, 2.0, -2.0, 2.0**-96, 2.0**-97]
MOMENTS += [2.0**37, 2.0**38, -(2.0**38), 1e-40, math.inf, -math.inf, math.nan]
SQUARES = [0.0, -0.0, 2.0**-96, 2.0**-97, 2.0**31, 2.0**32, 2.0**38, -1.0, -(2.0**-96), 1e-40, math.inf, math.nan]


def begin() -> None:
    if grid.COMPILER is not None:
        LIBRARY.begin()


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(LIBRARY.path()))
    for name in ("wrong_roots", "wrong_quotients", "wrong_scales"):
        getattr(found, name).restype = ctypes.c_int64
    for name in ("usual_float", "usual_bfloat16", "admissible_float"):
        getattr(found, name).restype = ctypes.c_bool
    found.root.restype, found.root.argtypes = ctypes.c_float, [ctypes.c_float]
    return found


@pytest.mark.parametrize("exponent", [-96, -95, 0, 1, 36, 37])
def test_a_root_is_sqrtf_for_every_mantissa(exponent: int) -> None:
    assert library().wrong_roots(exponent) == 0


@pytest.mark.parametrize("x", [0.0, -0.0])
def test_the_root_of_zero_has_its_sign(x: float) -> None:
    assert struct.pack("f", library().root(x)) == struct.pack("f", x)


def test_a_quotient_is_correctly_rounded() -> None:
    """For random numbers with the admitted exponents, and for the hardest: next to powers of two, and zeros."""
    random = np.random.default_rng(torch.initial_seed() % 2**32)

    def floats(count: int, low: int, high: int) -> np.ndarray:
        exponents = random.integers(low + 127, high + 127, count, dtype=np.uint32)
        near = random.integers(0, 2, count) == 0
        mantissas = np.where(near, random.integers(-4, 5, count) % 2**23, random.integers(0, 2**23, count))
        return (exponents << np.uint32(23) | mantissas.astype(np.uint32)).view(np.float32)

    count = 4_000_000
    a = floats(count, -96, 38) * random.choice(np.array([-1, 1, 0], np.float32), count, p=[0.45, 0.45, 0.1])
    a[:2] = 0.0, -0.0
    b = floats(count, -58, 30)
    assert library().wrong_quotients(a.ctypes.data_as(ctypes.c_void_p), b.ctypes.data_as(ctypes.c_void_p), count) == 0


@pytest.mark.parametrize("exponent", [-126, -120, -113, -112, -96, 0, 63, 127])
def test_scales_and_their_inverses_are_those_of_codes_h(exponent: int) -> None:
    assert library().wrong_scales(exponent) == 0


def bits(value: float, name: str) -> int:
    (found,) = struct.unpack("I", struct.pack("f", value))
    return found if name == "float" else found >> 16


@pytest.mark.parametrize("name", ["float", "bfloat16"])
def test_a_turn_is_usual_where_all_of_its_values_are(name: str) -> None:
    """In whichever half of a word the unusual value is, and with a neighbour that borrows or carries."""
    usual = getattr(library(), f"usual_{name}")
    pair = ctypes.c_uint32 * 2
    for p, m, v in itertools.product(PARAMS, MOMENTS, SQUARES):
        expected = abs(p) < 2 and 2.0**-63 <= abs(m) < 2 and 2.0**-96 <= v < 2.0**32
        found = [bits(p, "float"), bits(m, name), bits(v, name)]
        good = [bits(0.5, "float"), bits(-1e-3, name), bits(1e-6, name)]
        for order in (1, -1):
            arguments = [pair(*[x, y][::order]) for x, y in zip(found, good, strict=True)]
            assert usual(*arguments) == expected, (p, m, v)


def test_what_is_not_usual_may_be_admissible() -> None:
    pair = ctypes.c_float * 2
    for p, m, v, eps in itertools.product(PARAMS, MOMENTS, SQUARES, [0.0, 2.0**-59, 2.0**-58, 1e-8]):
        is_root = 2.0**-96 <= v < 2.0**38 or (v == 0 and eps >= 2.0**-58)
        expected = abs(p) < 2.0**127 and (m == 0 or 2.0**-96 <= abs(m) < 2.0**38) and is_root
        for order in (1, -1):
            arguments = [pair(*[x, y][::order]) for x, y in ((p, 0.5), (m, -1e-3), (v, 1e-6))]
            assert library().admissible_float(*arguments, ctypes.c_float(eps)) == expected, (p, m, v, eps)


@pytest.mark.parametrize("which", [None, "eps", "inv_sqrt_bc2", "decay", "delta_step", "step_size"])
@pytest.mark.parametrize(
    ("dtypes", "master", "stochastic"),
    [
        ((BF16, BF16, BF16, BF16), False, False),
        ((F32, F32, F32, F32), False, False),
        ((BF16, BF16, F32, BF16), True, False),
        ((BF16, BF16, BF16, BF16), False, True),
        ((BF16, BF16, torch.int8, torch.int8), False, True),
    ],
    ids=str,
)
def test_values_that_quick_divisions_do_not_take(
    dtypes: tuple[torch.dtype | None, ...], master: bool, stochastic: bool, which: str | None
) -> None:
    """Also rare values that they do take, and steps that allow none."""
    numels = [1, 31, 1000, 5000]
    problem = with_rare_values(Problem.random(numels, dtypes, master, stochastic))
    table = coefficients(len(numels)).table
    if which is not None:
        column = Coefficients._fields.index(which)
        values = {"eps": [0.0, 2.0**-60, 1e7, -1e-3], "inv_sqrt_bc2": [2.0**-11, 600.0, 1e30, 0.0]}
        table[:, column] = torch.tensor(values.get(which, [1.5, -40.0, 1e38, torch.inf]), device=table.device)
    expected = problem.clone()
    backends.load("reference").update(expected.plan(), table, with_delta=True)
    backends.load("cuda" if DEVICE.type == "cuda" else GRID).update(problem.plan(), table, with_delta=True)
    assert_same_bits(problem.outputs(), expected.outputs())
