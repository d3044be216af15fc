"""A few of the cuda backend's kernels, run from the PTX that nvcc generates, compared with the reference.

`make simulate` runs all of them. Changed kernels are detected; test_simulator_faults.py tests the other faults.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from filled import Pair, deltas_of, models, on_backend, random_groups
from problems import BF16, F16, F32, Problem, assert_same_bits, coefficients, run, tensors_of, with_rare_values
from simulator import session
from simulator.device import Device
from simulator.session import EVERY, MISSING, fresh_device, simulated
from torch import Tensor

from drift_kernels.kernels import reference
from drift_kernels.kernels.plan import CHUNK

begin = session.begin
INT8, FP8 = torch.int8, torch.float8_e4m3fn
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

Dtypes = tuple[torch.dtype | None, ...]
FEW: list[tuple[Dtypes, bool, bool]] = [  # as in simulator/few.cu; whether there are masters, and random rounding
    ((BF16, BF16, BF16, BF16), False, False),
    ((BF16, BF16, INT8, INT8), False, True),
    ((BF16, F32, F32, FP8), True, False),
]
NUMELS = [1, 0, 63, 1000, 2048 + 13, CHUNK + 333]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 6.1e-5, 65504.0, 65519.0, 3.3e38, -3.3e38]


def every() -> Iterator[tuple[Dtypes, bool, bool]]:
    for param, state, delta in itertools.product((F32, BF16, F16), (F32, BF16, INT8), (F32, BF16, INT8, FP8, None)):
        for grad, master, stochastic in itertools.product(dict.fromkeys((param, F32)), (False, True), (False, True)):
            codes = INT8 in (state, delta) or delta == FP8
            if param != BF16 and (master or stochastic or delta in (INT8, FP8)):
                continue
            if (param == F16 and codes) or (master and stochastic and state != BF16):
                continue
            yield (param, grad, state, delta), master, stochastic


COMBINATIONS = list(every()) if EVERY else FEW


def combination_id(combination: tuple[Dtypes, bool, bool]) -> str:
    dtypes, master, stochastic = combination
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return "-".join([*names, *["master"] * master, *["stochastic"] * stochastic])


@pytest.fixture
def device() -> Device:
    return fresh_device()


@pytest.fixture
def backend() -> ModuleType:
    return simulated()[1]


def placed(problem: Problem, layout: str) -> Problem:
    """The problem with its tensors aligned, misaligned by the same number of elements, or each by another."""

    def place(t: Tensor) -> Tensor:
        offset = {"aligned": 0, "alike": 3}.get(layout, int(torch.randint(16, ())))
        view = torch.empty(t.numel() + 16, dtype=t.dtype)[offset : offset + t.numel()]
        return view.copy_(t)

    return problem.each(place)


def with_special_values(problem: Problem) -> Problem:
    values = torch.tensor(SPECIAL)
    for o, grad in zip(problem.operands, problem.grads, strict=True):
        for name, t in {**tensors_of(o), "grad": grad}.items():
            if t.is_floating_point() and t.dtype != FP8:
                chosen = values[torch.randint(len(values), t.shape)].to(t.dtype)
                t.copy_(torch.where(torch.rand(t.shape) < 0.8, t, chosen))
                if name == "exp_avg_sq" or name.endswith("scale"):
                    t.abs_()
    return problem


def read_only(problem: Problem) -> list[Tensor]:
    return [*problem.grads, *(o.delta for o in problem.operands if o.delta is not None)]


# Kernels


@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_id)
def test_update_is_the_reference_bit_for_bit(device: Device, combination: tuple[Dtypes, bool, bool]) -> None:
    """In both orders of threads, whatever the approximations return, and nothing else is written."""
    for layout, change, nudge in (
        ("aligned", with_rare_values, 1),
        ("alike", with_special_values, -1),
        ("each", None, 0),
    ):
        problem = Problem.random(NUMELS, *combination)
        problem = placed(change(problem) if change else problem, layout)
        expected = run("reference", problem.clone(), steps=2)
        before = problem.clone()
        device.options(backward=layout == "alike", nudge=nudge)
        assert_same_bits(run("simulated", problem, steps=2), expected)
        for now, then in zip(read_only(problem), read_only(before), strict=True):
            assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))


@pytest.mark.parametrize("delta", [F32, BF16, INT8, FP8, None], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16, F16], ids=str)
def test_sums_and_bias(device: Device, backend: ModuleType, grad: torch.dtype, delta: torch.dtype | None) -> None:
    """The sums do not depend on the order of threads; the bias is bitwise identical to the reference."""
    if grad == F16 and delta in (INT8, FP8):
        return
    for layout in ("aligned", "each"):
        problem = placed(Problem.random(NUMELS, (grad, grad, F32, delta)), layout)
        plan, outs = problem.plan(), []
        for backward in (False, True):
            device.options(backward=backward)
            out = torch.full((len(plan), 2), math.nan, dtype=torch.float64)
            backend.grad_stats(plan, out, with_delta=True)
            outs.append(out)
        assert torch.equal(*outs)
        for o, g, sums in zip(problem.operands, problem.grads, outs[0], strict=True):
            x, read = g.double(), reference.read_delta(o)
            d = torch.zeros_like(x) if read is None else read.double()
            assert abs(sums[0] - x.square().sum()) <= 1e-6 * sums[0]
            assert abs(sums[1] - (x * d).sum()) <= 1e-6 * x.norm() * d.norm()
        if delta is not None:
            expected = problem.clone()
            reference.bias(expected.plan(), coefficients(len(plan), "absolute").table)
            backend.bias(plan, coefficients(len(plan), "absolute").table)
            assert_same_bits(problem.grads, expected.grads)


def test_an_access_outside_of_a_tensor_is_found(device: Device, backend: ModuleType) -> None:
    """A tensor has one element fewer than the plan says, or lacks the last chunk."""
    problem = Problem.random([CHUNK + 333], FEW[0][0])
    plan = problem.plan()
    table = coefficients(1).table
    plan.operands[0] = replace(problem.operands[0], exp_avg=problem.operands[0].exp_avg[:-1])
    with pytest.raises(RuntimeError, match=r"out of bounds: load of \d+ bytes, \d+ bytes from the begin of exp_avg"):
        backend.update(plan, table, with_delta=True)
    plan = problem.plan()
    plan.chunk_tensor = plan.chunk_tensor[:-1]
    with pytest.raises(RuntimeError, match=r"out of bounds: .*chunk_tensor.*block 1, thread"):
        backend.update(plan, table, with_delta=True)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (0, "there is no CUDA driver"),
        (11080, "NVIDIA driver for CUDA 12.1 or newer, and this one is for CUDA 11.8: update the driver"),
        (12000, "this one is for CUDA 12.0"),
        (12010, None),
        (13000, None),
    ],
)
def test_a_driver_that_cannot_take_the_launches_is_refused(
    device: Device, backend: ModuleType, driver: int, reason: str | None
) -> None:
    """Even if it can load a kernel."""
    device.driver(driver)
    found = backend._cuda.unusable(0)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("groups", [1, 9])
def test_coefficients_are_those_of_coefficients_py(
    groups: int, device: Device, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are separate kernels for few and for many param groups."""
    both = models({f"layers.{i}.weight": (3, 5 + i) for i in range(2 * groups)}, BF16)
    with on_backend("simulated"):
        pair = Pair(both, random_groups, backend, prior=deltas_of(both[0]), state_dtype=BF16, max_grad_norm=0.5)
        before = len(device.launched)
        for _ in range(3):
            pair.step(monkeypatch)
    assert sum("fill" in name for name in device.launched[before:]) == 3


# Changed kernels: which kernel, and all its instructions of one kind. Each is detected, by its bits or as a fault.

MUTANTS = [
    (2, r"(mul)\.rn\.f32", r"\1.rz.f32", "differs"),
    (2, r"(add)\.rn\.f32", r"\1.rp.f32", "differs"),
    (2, r"(fma)\.rn\.f32", r"\1.rm.f32", "differs"),
    (0, r"(st\.global\S* \[%\w+)\+?\d*\]", r"\1+16]", "out of bounds|differs|race"),
    (0, r"(st\.global\S* \[%\w+)\+?\d*\]", r"\1+1]", "misaligned"),
    (0, r"(ld\.global)\.cs", r"\1.nc", r"ld\.global\.nc"),
    (0, r"st\.global\S* [^;]*;", "", "differs"),
    (1, r"bar\.warp\.sync[^;]*;", "", "race"),
    (1, r"shfl\.sync\.bfly", "shfl.sync.up", "differs"),
    (1, r"mul\.wide\.u32", "mul.wide.s32", "differs"),
    (1, r"xor\.b32", "or.b32", "differs"),
    (1, r"max\.u32", "min.u32", "differs"),
    (1, r"sub\.rn\.f32", "sub.rz.f32", "differs"),
    (2, r"%ctaid\.x", "%tid.x", "out of bounds|differs|race"),
    (2, r"add\.s64", "sub.s64", "out of bounds|differs"),
]


def assert_is_noticed(device: Device, which: int, layout: str, pattern: str, replacement: str, words: str) -> None:
    problem = placed(Problem.random(NUMELS, *FEW[which]), layout)
    expected = run("reference", problem.clone(), steps=1)
    before = len(device.launched)
    assert_same_bits(run("simulated", placed(problem.clone(), layout), steps=1), expected)
    (name,) = set(device.launched[before:])
    source = device.sources[name]
    changed, count = re.subn(pattern, replacement, re.sub(r"[ \t]+", " ", source))
    assert count > 0, "the kernel has no such instruction: choose another mutant"
    device.change(name, changed)
    try:
        with pytest.raises((AssertionError, RuntimeError), match=words):
            assert_same_bits(run("simulated", problem, steps=1), expected)
    finally:
        device.change(name, source)


@pytest.mark.parametrize(("which", "pattern", "replacement", "words"), MUTANTS, ids=lambda value: str(value)[:40])
def test_changed_instructions_are_noticed(
    device: Device, which: int, pattern: str, replacement: str, words: str
) -> None:
    assert_is_noticed(device, which, "aligned", pattern, replacement, words)


@pytest.mark.parametrize("operation", ["div", "sqrt"])
def test_changed_divisions_and_roots_are_noticed(device: Device, operation: str) -> None:
    """In the turns that are not wide."""
    assert_is_noticed(device, 2, "each", rf"({operation})\.rn\.f32", r"\1.rm.f32", "differs")


@pytest.mark.skipif(not EVERY, reason="a few kernels only")
def test_every_kernel_has_been_run(device: Device) -> None:
    assert set(device.launched) >= device.sources.keys() - {"program"}
