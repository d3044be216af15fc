"""The PTX simulator: the faults that it finds, and the results of its instructions, in small programs."""

from __future__ import annotations

import math
from ctypes import c_uint32

import pytest
import torch
from simulator import session
from simulator.device import Device, FaultError
from simulator.session import MISSING, fresh_device
from torch import Tensor

begin = session.begin
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def device() -> Device:
    return fresh_device()


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
    """Run a program with 64 threads per block and two tensors of 64 numbers; the first is 0, 1, ..."""
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
    "outside of shared memory": (
        "st.shared.v4.u32 [tile+256], {%r1, %r1, %r1, %r1};",
        "out of bounds: .* at 256 of 256",
    ),
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
    "an unknown instruction": ("tanh.approx.f32 %f1, %f1;", r"UnknownError: tanh\.approx\.f32"),
    "an unknown directive": (".branchtargets L;", "UnknownError: the directive"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named(device: Device, what: str) -> None:
    body, words = FAULTS[what]
    with pytest.raises(FaultError, match=words):
        launched(device, body, blocks=2 if what == "between blocks" else 1)


def test_what_is_ordered_is_no_race(device: Device) -> None:
    """Ordered by a barrier of the block or the warp, or by an atomic operation before the last block's reads."""
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
    with pytest.raises(FaultError, match="race: read of element"):
        launched(device, last.replace("FENCE", ""), blocks=3)


def bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32))


# Compute %r7 from %r9, the number; %f1 has its bits.
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
    (
        "mov.b64 %d5, {%f1, %f1}; add.rz.f32x2 %d5, %d5, %d5; mov.b64 {%f2, %f3}, %d5; mov.b32 %r7, %f3;",
        bits(1.5),
        bits(3.0),
    ),
    (
        "ld.global.L1::no_allocate.v8.b32 {_, _, _, _, _, _, _, %r7}, [%d1];",
        0,
        7,
    ),
    ("setp.eq.u32 %p2, %r1, 0; @%p2 st.shared.u8 [tile+3], %r9; bar.sync 0; ld.shared.s8 %r7, [tile+3];", 200, -56),
    (
        "st.shared.u32 [%r3], %r9; bar.sync 0; mov.u64 %d5, tile; cvta.shared.u64 %d5, %d5; ld.u32 %r7, [%d5];",
        77,
        77,
    ),
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
    _, other = launched(
        device, f"mov.b32 %f1, %r9; {body} setp.eq.u32 %p3, %r1, 0; @%p3 st.global.u32 [%d2], %r7;", number
    )
    assert hex(int(other[0]) & 0xFFFFFFFF) == hex(expected & 0xFFFFFFFF)


def test_approximations_are_moved(device: Device) -> None:
    for nudge in (-2, 0, 1):
        device.options(nudge=nudge)
        body = "mov.b32 %f1, %r9; rcp.approx.f32 %f1, %f1; @%p1 bra L; @!%p1 st.global.f32 [%d4], %f1; L:"
        data, _ = launched(device, body, bits(3.0))
        assert int(data[63]) == bits(1 / 3) + nudge
