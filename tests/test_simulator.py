"""The cuda backend's own code, from the PTX that nvcc makes of it, against the reference: a few of its kernels.

All of them: `make simulate`. And what the simulator finds, in small programs and in kernels that were changed.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from ctypes import c_uint32
from dataclasses import replace
from functools import cache
from types import ModuleType

import pytest
import torch
from problems import BF16, DEVICE, F16, F32, Problem, assert_same_bits, coefficients, run, tensors_of
from simulator import build
from simulator.device import Device, Fault, backend_of
from torch import Tensor

from drift_kernels.kernels import reference
from drift_kernels.kernels.plan import CHUNK

INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Of an architecture: all kernels; otherwise a few, on sm_90.
EVERY = os.environ.get("DRIFT_KERNELS_SIMULATE")
REASON = "there is a GPU" if DEVICE.type == "cuda" else build.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

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


@cache
def begin() -> build.Build | None:
    return None if REASON else build.Build(EVERY or "90", "every" if EVERY else "few")


@cache
def simulated() -> tuple[Device, ModuleType]:
    begun = begin()
    assert begun is not None
    return backend_of(begun)


@pytest.fixture
def device() -> Iterator[Device]:
    found = simulated()[0]
    found.options()
    yield found
    found.options()


@pytest.fixture
def backend() -> ModuleType:
    return simulated()[1]


def placed(problem: Problem, layout: str) -> Problem:
    """Whose tensors are aligned, or off by as many elements, or each by its own."""

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
    """In both orders of threads, whatever approximations give, and nothing else is written."""
    for layout, special in (("aligned", False), ("alike", True), ("each", False)):
        problem = Problem.random(NUMELS, *combination)
        problem = placed(with_special_values(problem) if special else problem, layout)
        expected = run("reference", problem.clone(), steps=2)
        before = problem.clone()
        device.options(backward=layout == "alike", nudge={"aligned": 0, "alike": 1, "each": -1}[layout])
        assert_same_bits(run("simulated", problem, steps=2), expected)
        for now, then in zip(read_only(problem), read_only(before), strict=True):
            assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))


@pytest.mark.parametrize("delta", [F32, BF16, INT8, FP8, None], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16, F16], ids=str)
def test_sums_and_bias(device: Device, backend: ModuleType, grad: torch.dtype, delta: torch.dtype | None) -> None:
    """The sums' bits do not depend on the order of threads; the bias is the reference's, bit for bit."""
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
    """The kernel is given one element fewer of a tensor, or none of the last chunk, than the plan says."""
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


# Kernels that were changed: of what, and all of its instructions of a kind. Each is noticed, by its bits or as a fault.

MUTANTS = [
    (0, r"(mul)\.rn\.f32", r"\1.rz.f32", "differs"),
    (0, r"(add)\.rn\.f32", r"\1.rp.f32", "differs"),
    (2, r"(div|sqrt|rcp)\.rn\.f32", r"\1.rm.f32", "differs"),
    (0, r"(st\.global\S* \[%\w+)\+?\d*\]", r"\1+16]", "out of bounds|differs|race"),
    (0, r"(st\.global\S* \[%\w+)\+?\d*\]", r"\1+1]", "misaligned"),
    (0, r"(ld\.global)\.cs", r"\1.nc", r"ld\.global\.nc"),
    (0, r"st\.global\S* [^;]*;", "", "differs"),
    (1, r"bar\.sync\s+0;", "", "race|not written"),
    (1, r"mul\.lo\.s64", "mul.hi.s64", "differs"),
    (1, r"xor\.b64", "or.b64", "differs"),
    (1, r"max\.u32", "min.u32", "differs"),
    (1, r"sub\.rn\.f32", "sub.rz.f32", "differs"),
    (2, r"setp\.lt\.s32", "setp.le.s32", "out of bounds|differs"),
    (2, r"%ctaid\.x", "%tid.x", "out of bounds|differs|race"),
    (2, r"add\.s64", "sub.s64", "out of bounds|differs"),
]


@pytest.mark.parametrize(("which", "pattern", "replacement", "words"), MUTANTS, ids=lambda value: str(value)[:40])
def test_changed_instructions_are_noticed(
    device: Device, which: int, pattern: str, replacement: str, words: str
) -> None:
    problem = Problem.random(NUMELS, *FEW[which])
    expected = run("reference", problem.clone(), steps=1)
    device.launches.clear()
    assert_same_bits(run("simulated", problem.clone(), steps=1), expected)
    (name,) = set(device.launches)
    source = device.sources[name]
    changed, count = re.subn(pattern, replacement, re.sub(r"[ \t]+", " ", source))
    assert count > 0, "the kernel has no such instruction: the mutant wants another"
    device.change(name, changed)
    try:
        with pytest.raises((AssertionError, RuntimeError), match=words):
            assert_same_bits(run("simulated", problem, steps=1), expected)
    finally:
        device.change(name, source)


# Small programs

HEAD = ".entry program(.param .u64 data, .param .u64 other, .param .u32 number)\n.maxntid 64\n{\n"
DECLARED = """
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<9>; .reg .f32 %f<9>;
.shared .align 16 .b8 tile[256];
ld.param.u64 %d1, [data]; ld.param.u64 %d2, [other]; ld.param.u32 %r9, [number];
mov.u32 %r1, %tid.x; mul.wide.u32 %d3, %r1, 4; add.s64 %d4, %d1, %d3; mov.u32 %r2, tile; cvt.u32.u64 %r3, %d3;
add.s32 %r3, %r2, %r3; setp.lt.u32 %p1, %r1, 32; xor.b32 %r4, %r1, 1; shl.b32 %r5, %r4, 2; add.s32 %r5, %r2, %r5;
and.b32 %r6, %r1, 31;
"""


def launched(device: Device, body: str, number: int = 0, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Runs a program of 64 threads a block, with two tensors of 64 numbers, of which the first is 0, 1, ..."""
    device.change("program", f"{HEAD}{DECLARED}{body}\nret;\n")
    data, other = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    device.run("program", blocks, 64, data, other, c_uint32(number))
    return data, other


FAULTS = {
    "between threads, in shared memory": (
        "st.shared.u32 [%r3], %r1; bar.sync 0; st.shared.u32 [%r3], %r1; ld.shared.u32 %r7, [%r5];",
        "race: write of element 4 of shared memory, which was read by thread 0 of block 0",
    ),
    "of a read after a write": (
        "st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r7, [%r5]; st.shared.u32 [%r3], %r7;",
        "race: read of element 0 of shared memory, which was written by thread 0 of block 0",
    ),
    "of a write after several reads": (
        "st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r7, [tile+252]; @%p1 bra L; st.shared.u32 [%r3], %r7; L:",
        "race: write of element 252 of shared memory, which was read by several threads",
    ),
    "in global memory": ("ld.global.u32 %r7, [%d4]; st.global.u32 [%d1], %r7;", "race: .* of element 0 of argument 0"),
    "between blocks": ("st.global.u32 [%d4], %r1;", "race: write of element 0 .* written by thread 0 of block 0"),
    "a barrier after the end of a thread": (
        "@%p1 ret; bar.sync 0;",
        "a barrier that some threads miss: they have ended",
    ),
    "another barrier": ("@%p1 bra L; bar.sync 0; ret; L: bar.sync 0;", "some threads miss: they wait at another"),
    "a shuffle without a lane": (
        "setp.eq.u32 %p2, %r1, 5; @%p2 bra L; shfl.sync.bfly.b32 %r7|%p3, %r1, 1, 31, -1; L: bar.sync 0;",
        "a lane that the mask names is absent",
    ),
    "a value of a lane that has ended": (
        "setp.eq.u32 %p2, %r1, 5; @%p2 ret; shfl.sync.idx.b32 %r7, %r1, 5, 31, -1;",
        "a value of lane 5, which is absent",
    ),
    "a value of the other half": (
        "and.b32 %r8, %r1, 16; shl.b32 %r7, 0xffff, %r8; shfl.sync.bfly.b32 %r7, %r1, 16, 31, %r7;",
        "a value of lane 16, which is absent",
    ),
    "a mask without its thread": ("vote.sync.any.pred %p2, %p1, 0xfffe;", "own lane is absent from its mask"),
    "past the end": ("ld.global.u32 %r7, [%d4+4];", r"out of bounds: load of 4 bytes, 256 bytes from the begin of arg"),
    "before the begin": ("st.global.u32 [%d4+-4], %r1;", r"out of bounds: store of 4 bytes"),
    "outside of shared memory": ("st.shared.v4.u32 [tile+256], {%r1, %r1, %r1, %r1};", "out of bounds: .* at 256 of 256"),
    "outside of the parameters": ("ld.param.u64 %d5, [data+24];", "out of bounds: load of 8 bytes of the parameters"),
    "a vector off by a word": ("ld.global.v4.u32 {%r7, %r8, %r9, %r10}, [%d1+4];", "misaligned load of 16 bytes"),
    "a register": ("add.s32 %r7, %r8, 1;", r"operand 1 was not written; .* at `add.s32 %r7, %r8, 1`"),
    "a register that one branch writes": ("@%p1 mov.u32 %r7, 1; add.s32 %r8, %r7, 1;", "thread 32 .*|not written"),
    "shared memory": ("ld.shared.u32 %r7, [%r3];", "read of shared memory that was not written"),
    "read as a constant": (
        "ld.global.nc.u32 %r7, [%d4]; st.global.u32 [%d4], %r1;",
        "write of element 0 .* reads by ld.global.nc",
    ),
    "no end": ("L: bra L;", "does not end"),
    "an unknown instruction": ("tanh.approx.f32 %f1, %f1;", r"Unknown: tanh\.approx\.f32"),
    "an unknown directive": (".branchtargets L;", "Unknown: the directive"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named(device: Device, what: str) -> None:
    body, words = FAULTS[what]
    with pytest.raises(Fault, match=words):
        launched(device, body, blocks=2 if what == "between blocks" else 1)


def test_what_is_ordered_is_no_race(device: Device) -> None:
    """By a barrier of the block, one of the warp, and what the last block finds after an atomic operation."""
    exchanged = "st.shared.u32 [%r3], %r1; {}; ld.shared.u32 %r7, [%r5]; {}; st.shared.u32 [%r3], %r7;"
    for barrier in ("bar.sync 0", "bar.warp.sync -1"):
        launched(device, exchanged.format(barrier, barrier))
    last = """
        mov.u32 %r7, %ctaid.x; mul.wide.u32 %d5, %r7, 4; add.s64 %d5, %d1, %d5; setp.ne.u32 %p2, %r1, 0; @%p2 bra L;
        st.global.u32 [%d5], 7; FENCE atom.global.inc.u32 %r8, [%d2], 2; st.shared.u32 [tile], %r8;
        L: bar.sync 0; ld.shared.u32 %r8, [tile]; setp.ne.u32 %p2, %r8, 2; @%p2 ret;
        ld.global.u32 %r10, [%d1]; ld.global.u32 %r11, [%d1+4]; add.s32 %r10, %r10, %r11; setp.ne.u32 %p2, %r1, 63;
        @%p2 ret; st.global.u32 [%d2+252], %r10;
    """
    for backward in (False, True):
        device.options(backward=backward)
        _, other = launched(device, last.replace("FENCE", "membar.gl;"), blocks=3)
        assert int(other[63]) == 14
        assert int(other[0]) == 0
    with pytest.raises(Fault, match="race: read of element"):
        launched(device, last.replace("FENCE", ""), blocks=3)


def bits(x: float) -> int:
    return int(torch.tensor(x, dtype=F32).view(torch.int32))


# %r7 from %r9, the number, of which %f1 has the bits.
VALUES: list[tuple[str, int, int]] = [
    ("prmt.b32 %r7, %r9, 0x44332211, 0x5b10;", 0x8899AABB, 0x22FFAABB & 0xFFFFFFFF),
    ("lop3.b32 %r7, %r9, 0xff00ff00, 0x0f0f0f0f, 0x6a;", 0x12345678, (0x12345678 & 0xFF00FF00) ^ 0x0F0F0F0F),
    ("shf.l.wrap.b32 %r7, %r9, 0x12345678, 8;", 0xAB000000, 0x345678AB),
    ("shf.r.clamp.b32 %r7, 0x12345678, %r9, 40;", 0xAB, 0xAB),
    ("bfe.s32 %r7, %r9, 4, 4;", 0x80, -8),
    ("bfe.u32 %r7, %r9, 28, 8;", 0xF0000000, 15),
    ("bfi.b32 %r7, 0xff, %r9, 8, 4;", 0, 0xF00),
    ("min.s16x2 %r7, %r9, 0x00017fff;", 0xFFFF0002, 0xFFFF0002),
    ("mul.hi.u32 %r7, %r9, %r9;", 0xFFFFFFFF, 0xFFFFFFFE),
    ("mad.lo.s32 %r7, %r9, %r9, 5;", 7, 54),
    ("shr.s32 %r7, %r9, 40;", 0x80000000, -1),
    ("cvt.s32.s8 %r7, %r9;", 0x180, -128),
    ("cvt.sat.s8.s32 %r7, %r9;", 1000, 127),
    ("cvt.rni.s32.f32 %r7, %f1;", bits(2.5), 2),
    ("cvt.rmi.s32.f32 %r7, %f1;", bits(-2.5), -3),
    ("cvt.rzi.u32.f32 %r7, %f1;", bits(-3.0), 0),
    ("cvt.rzi.s32.f32 %r7, %f1;", bits(3e9), 0x7FFFFFFF),
    ("cvt.rzi.s32.f32 %r7, %f1;", bits(math.nan), 0),
    ("cvt.rn.bf16x2.f32 %r7, %f1, 0f3F808000;", bits(-1.0), 0xBF803F80),
    ("cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r7, %h1;", bits(math.inf), 0x7F80),
    ("cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r7, %h1;", 0x7F7FFFFF, 0x7F80),
    ("cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r7, %h1;", 0x00008001, 1),
    ("cvt.rz.bf16.f32 %h1, %f1; cvt.u32.u16 %r7, %h1;", 0x3F80FFFF, 0x3F80),
    ("cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r7, %h1;", bits(65520.0), 0x7C00),
    ("cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r7, %h1;", bits(2.0**-24 * 1.5), 2),
    ("mov.b32 {%h1, %h2}, %r9; cvt.f32.f16 %f2, %h2; mov.b32 %r7, %f2;", 0x00010000, bits(2.0**-24)),
    ("add.rn.f32 %f2, %f1, 0f7F800000; mov.b32 %r7, %f2;", bits(-math.inf), 0x7FFFFFFF),
    ("add.rz.f32 %f2, %f1, 0f337FFFFF; mov.b32 %r7, %f2;", bits(1.0), bits(1.0)),
    ("add.rp.f32 %f2, %f1, 0f00000001; mov.b32 %r7, %f2;", bits(1.0), bits(1.0) + 1),
    ("fma.rn.f32 %f2, %f1, %f1, 0fBF800000; mov.b32 %r7, %f2;", bits(1 + 2.0**-23), bits(2.0**-22 + 2.0**-46)),
    ("max.f32 %f2, %f1, 0f80000000; mov.b32 %r7, %f2;", bits(0.0), 0),
    ("min.f32 %f2, %f1, 0f3F800000; mov.b32 %r7, %f2;", bits(math.nan), bits(1.0)),
    ("min.NaN.f32 %f2, %f1, 0f3F800000; mov.b32 %r7, %f2;", bits(math.nan), 0x7FFFFFFF),
    ("rcp.approx.ftz.f32 %f2, %f1; mov.b32 %r7, %f2;", bits(4.0), bits(0.25)),
    ("mul.rn.ftz.f32 %f2, %f1, 0f3F000000; mov.b32 %r7, %f2;", 0x00800000, 0),
    ("setp.neu.f32 %p2, %f1, %f1; selp.b32 %r7, 1, 2, %p2;", bits(math.nan), 1),
    ("setp.ne.f32 %p2, %f1, %f1; selp.b32 %r7, 1, 2, %p2;", bits(math.nan), 2),
    ("shfl.sync.up.b32 %r7|%p2, %r1, 1, 0, -1; @%p2 mov.u32 %r7, %r9;", 9, 0),
    ("shfl.sync.bfly.b32 %r7, %r6, 8, 31, -1;", 0, 8),
    ("vote.sync.ballot.b32 %r7, %p1, -1;", 0, -1),
    ("redux.sync.max.u32 %r7, %r6, -1;", 0, 31),
    ("add.u64 %d5, %d2, 4; cvta.to.global.u64 %d5, %d5; sub.u64 %d5, %d5, %d2; cvt.u32.u64 %r7, %d5;", 0, 4),
]


@pytest.mark.parametrize(("body", "number", "expected"), VALUES, ids=lambda value: str(value))
def test_what_an_instruction_gives(device: Device, body: str, number: int, expected: int) -> None:
    """In thread 0."""
    _, other = launched(device, f"mov.b32 %f1, %r9; {body} setp.eq.u32 %p3, %r1, 0; @%p3 st.global.u32 [%d2], %r7;", number)
    assert hex(int(other[0]) & 0xFFFFFFFF) == hex(expected & 0xFFFFFFFF)


def test_approximations_are_moved(device: Device) -> None:
    for nudge in (-2, 0, 1):
        device.options(nudge=nudge)
        body = "mov.b32 %f1, %r9; rcp.approx.f32 %f1, %f1; @%p1 bra L; @!%p1 st.global.f32 [%d4], %f1; L:"
        data, _ = launched(device, body, bits(3.0))
        assert int(data[63]) == bits(1 / 3) + nudge
