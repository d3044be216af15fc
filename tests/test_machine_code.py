"""benchmarks.gpu.sheet: what is read off machine code, and the model that predicts from it."""

from __future__ import annotations

import math

import pytest
from listing import BF16, FAST, H200, KERNEL, kernel, listing, turn

from benchmarks.gpu import disassembly
from benchmarks.gpu.sheet import banks, entries, kinds, machines
from benchmarks.gpu.sheet.kinds import HEADLINES, SIZES, Traffic, parts
from benchmarks.gpu.sheet.machines import MACHINES
from benchmarks.gpu.sheet.model import Kernel, predict
from benchmarks.gpu.sheet.opcodes import Instruction, parse
from benchmarks.gpu.sheet.paths import Path, wide_path
from benchmarks.gpu.sheet.queues import Station, rounds
from benchmarks.gpu.sheet.walk import Costs, walk

# Machine code


def test_an_instruction_and_its_control_code() -> None:
    """Two lines, each with half of the bits; the control code is in the upper ones."""
    code = parse(
        "        /*0040*/              @!P3 LDG.E.EF.128 R4, desc[UR12][R2.64+0x10] ;   /* 0x0000860000067ab9 */\n"
        "                                                                               /* 0x000e620000000a00 */\n"
        "        /*0050*/                   FADD R8, R4, R5 ;                           /* 0x0000860000067ab9 */\n"
        "                                                                               /* 0x004fc40000000a00 */\n"
    )
    assert [(step.address, step.guard, step.opcode) for step in code] == [
        (0x40, "@!P3", "LDG.E.EF.128"),
        (0x50, "", "FADD"),
    ]
    load, add = code
    assert (load.stall, load.sets, load.frees, load.awaited) == (1, 1, 7, [])
    assert (add.stall, add.sets, add.frees, add.awaited) == (2, 7, 7, [2])
    assert (load.width, load.is_load, load.is_streamed, load.address_register) == (16, True, True, "R2")
    assert load.results == ["R4", "R5", "R6", "R7"]
    (wide,) = parse(listing("LDG.E.EF.ENL2.256 R12, R8, desc[UR4][R6.64]"))
    assert (wide.width, sorted(wide.results)) == (32, sorted(f"R{k}" for k in range(8, 16)))
    assert (load.pipe, add.pipe) == ("LSU", "FP32")
    assert Instruction(0, "", "UNHEARD.OF", "").pipe == "UNI"
    assert Instruction(0, "", "STRANGE", "").pipe == ""


def test_the_fast_path_of_the_wide_loop() -> None:
    found = turn(KERNEL)
    assert [step.name for step in found.steps] == FAST
    assert found.taken == [False] * (len(FAST) - 1) + [True]
    assert (found.wide_bytes, found.calls, found.inner_loops) == (48, 0, 0)
    assert found.pipes() == {"LSU": 3, "FP32": 2, "ALU": 4, "XU": 1, "CTRL": 2}
    assert [step.opcode for step in found.streams] == ["LDG.E.EF.128", "LDG.E.EF.128", "STG.E.EF.128"]


def test_a_path_without_calls_may_be_longer() -> None:
    """By as much as it likes; of two without calls it is the shorter."""
    longer = KERNEL.replace("FADD R20, R12, R16\n", "FADD R20, R12, R16\n" * 30)
    assert len(turn(longer).steps) == len(FAST) + 29
    without = KERNEL.replace("    CALL.REL.NOINC =division\n", "")
    assert [step.name for step in turn(without).steps] == [*FAST[:5], "MOV", "STG", "BRA", *FAST[-3:]]


def test_stores_that_some_threads_leave_out_are_made() -> None:
    """Of scales, by one of the threads that share them."""
    scales = "@P3 BRA =next\n STG.E.EF desc[UR4][R6.64], R22\n next: IADD3 R2"
    found = turn(KERNEL.replace("next: IADD3 R2", scales))
    assert [step.width for step in found.streams] == [16, 16, 16, 4]
    assert len(found.steps) == len(FAST) + 2


def test_one_instruction_more_is_one_more() -> None:
    more = KERNEL.replace("FMUL R20, R21, R20", "FMUL R20, R21, R20\n FMUL R20, R20, R20")
    assert turn(more).pipes() - turn(KERNEL).pipes() == {"FP32": 1}


def test_without_hints_streams_are_what_moves() -> None:
    """Not keys and coefficients, whose addresses stay."""
    text = """
        head: LDG.E.128 R12, desc[UR4][R2.64]
        LDG.E.128 R16, desc[UR4][R8.64]
        FSETP.NAN.AND P1, PT, R12, R12, PT
        STG.E.128 desc[UR4][R2.64], R12
        IADD3 R2, P0, R2, 0x1000, RZ
        @P0 BRA =head
        EXIT
    """
    assert [step.name for step in turn(text).streams] == ["LDG", "STG"]


def test_inner_loops_count_once_and_the_loop_that_holds_a_wide_one_is_not_it() -> None:
    text = """
        outer: LDG.E.EF.128 R12, desc[UR4][R2.64]
        head: LDG.E.EF.128 R12, desc[UR4][R2.64]
        keys: FADD R5, R5, R12
        @P1 BRA =keys
        IADD3 R2, P0, R2, 0x1000, RZ
        @P0 BRA =head
        @P2 BRA =outer
        EXIT
    """
    found = turn(text)
    assert [step.name for step in found.steps] == ["LDG", "FADD", "BRA", "IADD3", "BRA"]
    assert found.inner_loops == 1
    assert kernel(found).remarks()[0].startswith("inner loops: 1")


def test_a_kernel_without_a_wide_loop_has_no_path() -> None:
    assert wide_path(parse(listing("LDG.E.EF.128 R12, desc[UR4][R2.64]\n EXIT"))) is None


def test_banks_of_shared_memory() -> None:
    """Threads 4, 64 and 128 bytes apart; those that read one word; an address that cannot be followed."""

    def cycles(address: str, access: str) -> tuple[int, bool]:
        code = f"S2R R0, SR_TID.X\n LDG.E R7, desc[UR4][R8.64]\n {address}\n head: LDG.E.EF.128 R12, desc[UR4][R2.64]\n"
        found = turn(f"{code} {access}\n @P0 BRA =head\n EXIT")
        each, followed = banks.shared_cycles(found)
        assert sum(each) == each[1]
        return each[1], followed

    assert cycles("IMAD.SHL.U32 R4, R0, 0x4, RZ", "LDS R16, [R4]") == (1, True)
    assert cycles("IMAD.SHL.U32 R4, R0, 0x10, RZ", "LDS.128 R16, [R4+0x400]") == (4, True)
    assert cycles("LEA R4, R0, UR6, 0x6", "STS.128 [R4], R16") == (16, True)
    assert cycles("SHF.L.U32 R4, R0, 0x7, RZ", "LDS R16, [R4+UR4]") == (32, True)
    assert cycles("LOP3.LUT R4, R0, 0x10, RZ, 0xc0, !PT", "LDS R16, [R4]") == (1, True)
    assert cycles("IMAD R4, R7, R0, RZ", "LDS.64 R16, [R4]") == (2, False)


# The model


def plain_costs(path: Path) -> Costs:
    streams = set(map(id, path.streams))
    return Costs([step.width if id(step) in streams else 0 for step in path.steps], [0] * len(path.steps))


def test_a_warp_alone_waits_for_what_it_requested() -> None:
    """Once for two loads side by side, twice for one after the other; then half as much is in flight."""

    def of(*waits: int) -> Path:
        load = {"guard": "", "opcode": "LDG.E.EF.128", "operands": "R4, desc[UR4][R2.64]", "stall": 1}
        steps = [Instruction(0, sets=0, **load), Instruction(16, sets=1, waits=waits[0], **load)]
        steps += [Instruction(32, "", "FADD", "R8, R4, R5", stall=4, waits=waits[1])]
        steps += [Instruction(48, "@P0", "BRA", "0x0", stall=1)]
        return Path(steps, [False, False, False, True], [], steps[:2], 0)

    together, serial = of(0b00, 0b11), of(0b01, 0b10)
    rest = 5 + machines.TAKEN_BRANCH  # of the addition and the branch
    alone = walk(together, plain_costs(together), H200, 1000)
    assert (alone.phases[0].cycles, alone.in_flight) == (machines.INTERVALS["LSU"] + 1000 + rest, 32)
    alone = walk(serial, plain_costs(serial), H200, 1000)
    assert (alone.phases[0].cycles, alone.in_flight) == (2 * 1000 + rest, 16)
    assert alone.phases[0].busy["issue"] == 4
    assert alone.phases[0].busy["memory"] == pytest.approx(32 * 32 / H200.copied)


def test_queues_agree_with_what_is_known_in_closed_form() -> None:
    """One customer; so many that a server never rests; and machines that wait for a repairman, exactly."""
    assert rounds(1, 7.0, [Station(2.0), Station(1.0)]) == pytest.approx(1 / 10)
    assert rounds(500, 7.0, [Station(2.0), Station(4.0, servers=4)]) == pytest.approx(1 / 2)
    count, away, time = 6, 10.0, 3.0
    idle = 1 / sum(math.perm(count, n) * (time / away) ** n for n in range(count + 1))
    assert rounds(count, away, [Station(time, varies=1.0)]) == pytest.approx((1 - idle) / time)
    assert rounds(count, away, [Station(time)]) > rounds(count, away, [Station(time, varies=1.0)])


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"), [(32, 0, 8), (64, 0, 4), (65, 0, 3), (80, 0, 3), (81, 0, 2), (64, 100_000, 2)]
)
def test_blocks_of_a_multiprocessor(registers: int, shared: int, blocks: int) -> None:
    assert kernel(turn(KERNEL), registers, shared).blocks == blocks


def test_what_stops_a_kernel() -> None:
    """More instructions, more registers, longer latency: never faster; and each is named where it is what stops it."""

    def share(path: Path, registers: int = 64, ns: float = 2000) -> float:
        return predict(kernel(path, registers), H200, ns).share

    quick = turn(KERNEL)
    busy = turn(KERNEL.replace("FADD R20, R12, R16\n", "FADD R20, R12, R16\n" * 900))
    waiting = turn(KERNEL.replace("MUFU.RCP R21, R20", "MUFU.RCP R21, R20\n BAR.SYNC.DEFER_BLOCKING 0x0"))
    assert share(quick, ns=100) == 1
    assert 1 > share(quick) > share(quick, 128) > share(quick, 128, 3000) > 0
    assert share(busy) < 0.5 < share(quick)
    assert share(waiting) < share(quick)
    assert predict(kernel(quick), H200, 100).bound == "memory"
    assert predict(kernel(quick), H200, 2000).bound == "latency"
    assert predict(kernel(busy), H200, 800).bound == "issue"
    assert predict(kernel(waiting), H200, 2000).bound == "barriers"


def test_bytes_of_kernels() -> None:
    assert kinds.traffic(BF16) == Traffic(16, 0)
    assert kinds.traffic("update<master_bfloat16, bfloat16, float, Nothing>") == Traffic(26, 0)
    assert kinds.traffic("update<stochastic_bfloat16, bfloat16, int8_state, int8_code>") == Traffic(11, 5 * 4 / 128)
    assert kinds.traffic("sum<bfloat16, fp8_code>") == Traffic(3, 4 / 128)
    assert kinds.traffic("bias<float, bfloat16>") == Traffic(10, 0)
    assert kinds.traffic("fill<8l>") is None
    assert kinds.traffic("triton sum<bfloat16, fp8_code>") == Traffic(3, 4 / 128)
    labels = [kinds.label(name) for name in HEADLINES]
    assert labels[4] == "update bf16, bf16 states, stochastic, bf16 prior"
    assert len(set(labels)) == len(labels)


def test_names_of_tritons_kernels() -> None:
    """As tests/sass.py has them."""
    for name, expected in {
        "_update_chunk bf16 bf16 fp32 bf16": "update<bfloat16, bfloat16, float, bfloat16>",
        "_update_chunk fp16 fp16 fp32 None": "update<float16, float16, float, Nothing>",
        "_update_chunk bf16 bf16 bf16 uint8 param_at_random state_at_random": "update<stochastic_bfloat16, bfloat16, "
        "stochastic_bfloat16, fp8_code>",
        "_update_chunk bf16 bf16 bf16 None master state_at_random": "update<master_bfloat16, bfloat16, "
        "stochastic_bfloat16, Nothing>",
        "_update_chunk bf16 bf16 int8 int8 master": "update<master_bfloat16, bfloat16, int8_state, int8_code>",
        "_sum_chunk bf16 uint8": "sum<bfloat16, fp8_code>",
    }.items():
        assert kinds.of_triton(name) == f"triton {expected}"
    assert kinds.of_triton("_sum_tensor") is None


# What was built


@pytest.fixture(scope="module")
def built() -> list[Kernel]:
    extension = disassembly.built()
    if extension is None or disassembly.missing() is not None:
        pytest.skip(str(disassembly.missing() or "drift_kernels._cuda was not built"))
    arch = next(
        (arch for arch in ("sm_90", *machines.ARCHITECTURES) if arch in disassembly.architectures(extension)), None
    )
    if arch is None:
        pytest.skip("the extension is of another architecture")
    return entries.kernels(extension, arch)


def test_the_wide_loop_of_every_kernel_is_found(built: list[Kernel]) -> None:
    """Eight elements a turn for updates, sixteen for the bias, 64 bytes for sums: with bytes that are those of the
    dtypes."""
    assert len(built) > 100
    for one in built:
        kernel, dtypes = parts(one.name) or ("", [])
        bytes_each = sum(SIZES[dtype] for dtype in dtypes)
        turned = {"update": 8, "bias": 16}.get(kernel) or next(n for n in (32, 16, 8) if n * bytes_each <= 64)
        assert (one.elements, one.threads) == (turned, 256), one.name
        assert not [remark for remark in one.remarks() if "elements per turn" in remark or "as ALU" in remark], one.name
        assert one.path.calls == 0, one.name


def test_a_known_kernel(built: list[Kernel]) -> None:
    one = next(one for one in built if one.name == BF16)
    assert [step.name for step in one.path.streams] == ["LDG"] * 5 + ["STG"] * 3
    assert {step.width for step in one.path.streams} == {16}
    assert one.path.pipes()["FP32"] >= 8 * 20  # the operations of docs/numerics.md, some fused into roots and divisions
    shares = [predict(one, machine, ns).share for machine in MACHINES if machine.arch == one.arch for ns in (800, 1400)]
    assert all(0.3 < share <= 1 for share in shares)
