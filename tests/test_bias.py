"""The bias alone: every backend is bitwise identical to reference.bias_."""

from __future__ import annotations

import itertools
import math

import grid
import pytest
import torch
from problems import BF16, DEVICE, F16, F32, GRID, Problem, assert_same_bits, coefficients, tensors_of, threads

from drift_kernels.kernels import backends, reference
from drift_kernels.kernels.coefficients import Coefficients
from drift_kernels.kernels.operands import Operands
from drift_kernels.kernels.plan import CHUNK

INT8, FP8 = torch.int8, torch.float8_e4m3fn
begin = grid.begin
DTYPES = [
    (grad, delta)
    for grad in (F32, BF16, F16)
    for delta in (F32, BF16, INT8, FP8)
    if grad != F16 or delta not in (INT8, FP8)
]


def available() -> list[str]:
    names = [name for name in (*backends.NAMES, GRID) if name != "reference"]
    return [name for name in names if backends.load(name).unavailable(DEVICE) is None]


def interpreted(name: str) -> bool:
    return name == "triton" and DEVICE.type == "cpu"


def problem_of(numels: list[int], grad: torch.dtype, delta: torch.dtype) -> Problem:
    return Problem.random(numels, (grad, grad, F32, delta))


def biased(name: str, problem: Problem) -> list[torch.Tensor]:
    """The gradients after two biases, with other coefficients for each tensor."""
    plan = problem.plan()
    for _ in range(2):
        table = coefficients(len(plan), "absolute").table
        with threads(name):
            backends.load(name).bias(plan, table)
    return problem.grads


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize(("grad", "delta"), DTYPES, ids=str)
def test_it_is_the_reference_bit_for_bit(name: str, grad: torch.dtype, delta: torch.dtype) -> None:
    big = [CHUNK + 17] if interpreted(name) else [CHUNK - 1, 65_537, 1_000_003]
    problem = problem_of([0, 1, 63, 1000, *big], grad, delta)
    others = problem.clone()
    expected = biased("reference", problem.clone())
    assert_same_bits(biased(name, problem), expected)
    assert_same_bits(problem.outputs(), others.outputs())  # nothing but gradients is written


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize(("grad", "delta"), [(BF16, BF16), (F16, F32), (F32, F32), (BF16, INT8)], ids=str)
def test_special_values(name: str, grad: torch.dtype, delta: torch.dtype) -> None:
    """NaN, infinities, zeros of both signs, subnormals and the largest values."""
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 6.1e-5, 65504.0, 65519.0, 3.3e38, -3.3e38]
    values = torch.tensor(special, dtype=F32, device=DEVICE)
    problem = problem_of([4096], grad, delta)
    tensors = [*problem.grads, *tensors_of(problem.operands[0]).values()]
    for tensor in (t for t in tensors if t.is_floating_point()):
        chosen = values[torch.randint(len(values), tensor.shape, device=DEVICE)].to(tensor.dtype)
        tensor.copy_(torch.where(torch.rand(tensor.shape, device=DEVICE) < 0.5, tensor, chosen))
    expected = biased("reference", problem.clone())
    assert_same_bits(biased(name, problem), expected)


@pytest.mark.parametrize("name", [*available(), "reference"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_it_rounds_once_as_torch_casts(name: str, dtype: torch.dtype, fraction: float) -> None:
    """Every finite value of a narrow dtype plus a fraction of its ulp: below, on and above the tie."""
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[patterns.isfinite()]
    ulp = (values.abs().view(torch.int16) ^ 1).view(dtype).float().sub(values.abs().float()).abs()
    delta = torch.where(ulp.isfinite(), ulp, 0.0) * fraction * values.float().sign()
    nothing = torch.empty(0)
    problem = Problem([Operands(torch.zeros_like(values), nothing, nothing, delta)], [values.clone()])
    problem = problem.each(lambda t: t.to(DEVICE))
    row = torch.tensor([[-1.0 if field == "delta_coef" else math.nan for field in Coefficients._fields]], device=DEVICE)
    backends.load(name).bias(problem.plan(), row)
    assert_same_bits(problem.grads, [(values.float() + delta).to(dtype).to(DEVICE)])


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize(("grad", "delta"), [(BF16, BF16), (F32, BF16), (BF16, FP8)], ids=str)
def test_views_of_any_alignment(name: str, grad: torch.dtype, delta: torch.dtype) -> None:
    """Nothing outside the gradients is written."""
    problem = problem_of([1000, 777, 4001, CHUNK + 5], grad, delta)
    expected = biased("reference", problem.clone())
    offsets = itertools.cycle((1, 3, 2, 7, 5))
    buffers = []

    def moved(t: torch.Tensor) -> torch.Tensor:
        buffer, offset = torch.zeros(t.numel() + 16, dtype=t.dtype, device=DEVICE), next(offsets)
        buffers.append((buffer, offset, t.numel()))
        return buffer[offset:][: t.numel()].copy_(t)

    assert_same_bits(biased(name, problem.each(moved)), expected)
    for buffer, offset, numel in buffers:
        assert not buffer[:offset].float().any()
        assert not buffer[offset + numel :].float().any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="instruction sets are the cpu backend's")
def test_every_instruction_set_gives_the_same_bits() -> None:
    from drift_kernels import _cpu

    sets = _cpu.instruction_sets()
    for grad, delta in DTYPES:
        problem = problem_of([1, 1000, 40_001], grad, delta)
        expected = biased("reference", problem.clone())
        try:
            for name in sets:
                _cpu.select_instruction_set(name)
                assert_same_bits(biased("cpu", problem.clone()), expected)
        finally:
            _cpu.select_instruction_set(sets[-1])


def test_the_reference_is_the_formula() -> None:
    delta, grad = torch.randn(50, 3), torch.randn(50, 3)
    c = torch.tensor(0.3)
    expected = grad - c * delta
    row = Coefficients(*[c if field == "delta_coef" else torch.tensor(math.nan) for field in Coefficients._fields])
    reference.bias_(Operands(torch.zeros(50, 3), grad, grad, delta), grad, row)
    assert torch.equal(grad, expected)
