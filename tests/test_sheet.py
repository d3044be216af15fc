"""benchmarks.gpu.sheet: what is read off machine code, the model's parts, and the sheet beside what was measured."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.gpu import disassembly, suite
from benchmarks.gpu.sheet import __main__ as command
from benchmarks.gpu.sheet import banks, entries, kinds, machines, measured
from benchmarks.gpu.sheet.instructions import Instruction, parse
from benchmarks.gpu.sheet.kinds import HEADLINES, Traffic
from benchmarks.gpu.sheet.machines import MACHINES
from benchmarks.gpu.sheet.model import Kernel, predict
from benchmarks.gpu.sheet.paths import Path as Turn
from benchmarks.gpu.sheet.paths import wide_path
from benchmarks.gpu.sheet.queues import Station, rounds
from benchmarks.gpu.sheet.walk import Costs, walk

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BF16 = "update<bfloat16, bfloat16, bfloat16, bfloat16>"
H200 = next(machine for machine in MACHINES if machine.name == "H200")


def listing(text: str) -> str:
    """As cuobjdump writes it, of lines "label: instruction {sets 0}": with an address in the place of `=label`, and a
    control code that sets a barrier, or waits for one."""
    found = [
        re.fullmatch(r"(?:(\w+): )?(.*?)(?: \{(sets|waits) (\d)\})?", line.strip())
        for line in text.strip().splitlines()
    ]
    places = {one[1]: hex(16 * k) for k, one in enumerate(found) if one[1]}
    lines = []
    for k, one in enumerate(found):
        step = re.sub(r"=(\w+)", lambda label: places[label[1]], one[2])
        sets, waits = (int(one[4]) if one[3] == kind else None for kind in ("sets", "waits"))
        code = 1 | (7 if sets is None else sets) << 5 | 7 << 8 | (0 if waits is None else 1 << waits) << 11
        lines += [f"        /*{16 * k:04x}*/    {step} ;   /* 0x0123456789abcdef */", f"    /* 0x{code << 41:016x} */"]
    return "\n".join(lines)


def turn(text: str) -> Turn:
    found = wide_path(parse(listing(text)))
    assert found is not None
    return found


# Two paths for a turn, chosen by a vote of the warp; the slow one is the shorter, but for what it calls. Afterwards
# elements one by one, and a loop over other memory, which is not streamed.
KERNEL = """
    S2R R0, SR_TID.X
    LDG.E R9, desc[UR4][R8.64]
    head: LDG.E.EF.128 R12, desc[UR4][R2.64] {sets 0}
    LDG.E.EF.128 R16, desc[UR4][R4.64] {sets 0}
    FSETP.GEU.AND P0, PT, R12, R16, PT {waits 0}
    VOTE.ANY P1, P0
    @P1 BRA =slow
    FADD R20, R12, R16
    MUFU.RCP R21, R20
    FMUL R20, R21, R20
    STG.E.EF.128 desc[UR4][R2.64], R20
    next: IADD3 R2, P0, R2, 0x1000, RZ
    IADD3 R4, P0, R4, 0x1000, RZ
    @P0 BRA =head
    BRA =single
    slow: MOV R20, R12
    CALL.REL.NOINC =division
    STG.E.EF.128 desc[UR4][R2.64], R20
    BRA =next
    single: @!P2 LDG.E.EF.U16 R12, desc[UR4][R2.64]
    STG.E.EF.U16 desc[UR4][R2.64], R12
    @P0 BRA =single
    total: LDG.E.64.STRONG.GPU R12, desc[UR4][R6.64]
    LDG.E.64.STRONG.GPU R14, desc[UR4][R6.64+0x1000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x2000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x3000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x4000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x5000]
    LDG.E.64.STRONG.GPU R16, desc[UR4][R6.64+0x6000]
    DADD R18, R12, R14
    IADD3 R6, P0, R6, 0x8000, RZ
    @P0 BRA =total
    EXIT
    division: RET.REL.NODEC R36 0x0
"""
FAST = ["LDG", "LDG", "FSETP", "VOTE", "BRA", "FADD", "MUFU", "FMUL", "STG", "IADD3", "IADD3", "BRA"]


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
    assert (load.width, load.is_load, load.evicts_first, load.address_register) == (16, True, True, "R2")
    assert load.results == ["R4", "R5", "R6", "R7"]
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
    without = KERNEL.replace("CALL.REL.NOINC =division", "MOV R20, R12")
    assert [step.name for step in turn(without).steps].count("MOV") == 2


def test_one_instruction_more_is_one_more() -> None:
    more = KERNEL.replace("FMUL R20, R21, R20", "FMUL R20, R21, R20\n FMUL R20, R20, R20")
    assert turn(more).pipes() - turn(KERNEL).pipes() == {"FP32": 1}


def test_without_hints_streams_are_what_moves() -> None:
    """Not keys and coefficients, whose addresses stay."""
    text = """
        head: LDG.E.128 R12, desc[UR4][R2.64]
        LDG.E.128 R16, desc[UR4][R8.64]
        STG.E.128 desc[UR4][R2.64], R12
        IADD3 R2, P0, R2, 0x1000, RZ
        @P0 BRA =head
        EXIT
    """
    assert [step.name for step in turn(text).streams] == ["LDG", "STG"]


def test_inner_loops_count_once_and_the_loop_that_holds_a_wide_one_is_not_it() -> None:
    text = """
        outer: MOV R5, RZ
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


def kernel(path: Turn, registers: int = 80, shared: int = 0, moved: float = 16) -> Kernel:
    return Kernel(BF16, "sm_90", Traffic(moved, 0), path, registers, shared, 256)


def plain_costs(path: Turn) -> Costs:
    streams = set(map(id, path.streams))
    return Costs([step.width if id(step) in streams else 0 for step in path.steps], [0] * len(path.steps))


def test_a_warp_alone_waits_for_what_it_requested() -> None:
    """Once for two loads side by side, twice for one after the other; then half as much is in flight."""

    def of(*waits: int) -> Turn:
        load = {"guard": "", "opcode": "LDG.E.EF.128", "operands": "R4, desc[UR4][R2.64]", "stall": 1}
        steps = [Instruction(0, sets=0, **load), Instruction(16, sets=1, waits=waits[0], **load)]
        steps += [Instruction(32, "", "FADD", "R8, R4, R5", stall=4, waits=waits[1])]
        steps += [Instruction(48, "@P0", "BRA", "0x0", stall=1)]
        return Turn(steps, [False, False, False, True], [], steps[:2], 0)

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

    def share(path: Turn, registers: int = 64, ns: float = 2000) -> float:
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
    labels = [kinds.label(name) for name in HEADLINES]
    assert labels[4] == "update bf16, bf16 states, stochastic, bf16 prior"
    assert len(set(labels)) == len(labels)


# The sheet


def of_headlines() -> list[Kernel]:
    """The headline kernels on every architecture, all of them made of one loop."""
    found = []
    for arch in machines.ARCHITECTURES:
        for name in HEADLINES:
            moved = kinds.traffic(name)
            assert moved is not None
            found.append(Kernel(name, arch, moved, turn(KERNEL), 80, 0, 256))
    return found


@pytest.fixture
def sheet() -> entries.Sheet:
    rest = {"what": entries.WHAT, "commit": "0" * 40, "dirty": False, "date": "", "compiler": "a compiler"}
    made = [entries.entry(one) for one in of_headlines()]
    return {**rest, "constants": machines.constants(), "kernels": made}


def test_a_sheet_is_kept_as_json(sheet: entries.Sheet, tmp_path: Path) -> None:
    """A line for each kernel, so that two sheets can be compared as text."""
    path = tmp_path / "sheet.json"
    entries.write(sheet, path)
    assert entries.read(path) == json.loads(json.dumps(sheet))
    lines = [line for line in path.read_text().splitlines() if '"kernel":' in line]
    assert len(lines) == len(sheet["kernels"]) == 3 * len(HEADLINES)


def test_an_entry_says_what_its_kernel_does(sheet: entries.Sheet) -> None:
    entry = entries.by_kernel(sheet)["sm_90", BF16]
    assert entry["bytes_per_element"] == 16
    assert entry["elements_per_turn"] == 3
    assert entry["instructions_per_element"] == len(FAST) / 3
    assert (entry["blocks"], entry["registers"]) == (3, 80)
    assert set(entry["machines"]) == {"H100", "H200"}
    h200 = entry["machines"]["H200"]
    for ns in machines.LATENCIES:
        assert h200["share"][str(ns)] == round(predict(of_headlines()[len(HEADLINES) + 1], H200, ns).share, 3)
    copy = 16 / (4.8 * machines.COPY_SHARE)  # us for a million elements of 16 bytes
    assert h200["us_per_million"] == pytest.approx(copy / h200["share"][str(machines.LATENCIES[-1])], abs=0.02)
    assert h200["kb_in_flight"] == 32 * 256 * 3 / 1024  # two loads of 16 bytes, before the first is waited for


def test_constants_are_all_there() -> None:
    kept = machines.constants()
    assert set(kept["machines"]) == {"A100", "H100", "H200", "B200"}
    assert {"copy_share", "latencies", "intervals", "prologue", "l1_bytes", "varies"} <= set(kept)
    for arch in machines.ARCHITECTURES:
        assert set(machines.units(arch).values()) <= set(machines.intervals(arch))


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    """Rows that benchmarks.step has written, as if the cuda backend had run on an H200."""
    rows = json.loads((RESULTS / "modes-cpu.json").read_text())
    contenders = {"cpu": "cuda"}
    return [
        {**row, "contender": contenders.get(row["contender"], row["contender"]), "device": "NVIDIA H200"}
        for row in rows
    ]


def write_run(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As `make gpu` leaves it."""
    work = folder / "work"
    work.mkdir()
    (work / "modes.json").write_text(json.dumps(rows))
    suite.write_results(folder, work, [])


def a_step_of(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """With bfloat16 states, and nothing special."""
    mode = {"contender": "cuda", "scaling": "absolute", "states": "bfloat16", "rounding": "nearest", "master": False}
    return next(
        row for row in steps if all(row[key] == value for key, value in {**mode, "prior_dtype": "same"}.items())
    )


def test_predictions_stand_beside_measurements(
    sheet: entries.Sheet, steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_run(tmp_path, steps)
    compared = {one["mode"]: one for one in measured.compare(sheet, tmp_path) if one["scaling"] == "absolute"}
    headlines = {"fp32 states", "bf16 states", "bf16 states, stochastic", "fp32 states, master", "int8 states, master"}
    assert set(compared) == headlines | {"int8 states, stochastic, int8 prior"}
    one = compared["bf16 states"]
    row = a_step_of(steps)
    assert (one["machine"], one["run"], one["kernels"]) == ("H200", "modes", [BF16])
    assert one["measured_percent"] == round(row["percent_of_copy"], 1)
    predicted = entries.by_kernel(sheet)["sm_90", BF16]["machines"]["H200"]["share"]
    assert one["predicted_percent"] == {ns: pytest.approx(100 * share, abs=0.2) for ns, share in predicted.items()}


def test_a_step_of_two_launches_takes_the_time_of_both(
    sheet: entries.Sheet, steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Ours reads gradients and deltas twice, of which a step with gradnorm must read the gradients alone."""
    row = a_step_of(steps)
    write_run(tmp_path, [{**row, "scaling": "gradnorm", "bytes_per_param": 18.0}])
    (one,) = measured.compare(sheet, tmp_path)
    assert one["kernels"] == ["sum<bfloat16, bfloat16>", BF16]
    shares = [entries.by_kernel(sheet)["sm_90", name]["machines"]["H200"]["share"]["1400"] for name in one["kernels"]]
    assert one["predicted_percent"]["1400"] == pytest.approx(100 * 18 / (4 / shares[0] + 16 / shares[1]), abs=0.1)


def test_a_run_without_anything_predicted_is_refused(
    sheet: entries.Sheet, steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_run(tmp_path, [{**row, "device": "NVIDIA T4"} for row in steps])
    with pytest.raises(ValueError, match=r"no step of the cuda backend that was predicted .*T4"):
        measured.compare(sheet, tmp_path)


@pytest.mark.parametrize(
    ("change", "kernels"),
    [
        ({}, ["update<bfloat16, bfloat16, bfloat16, bfloat16>"]),
        ({"scaling": "none", "prior_dtype": None}, ["update<bfloat16, bfloat16, bfloat16, Nothing>"]),
        ({"clip": True, "scaling": "none", "prior_dtype": None}, ["sum<bfloat16, Nothing>"]),
        ({"master": True, "states": "float32"}, ["update<master_bfloat16, bfloat16, float, bfloat16>"]),
        (
            {"master": True, "rounding": "stochastic"},
            ["update<master_bfloat16, bfloat16, stochastic_bfloat16, bfloat16>"],
        ),
        ({"rounding": "stochastic", "states": "int8"}, ["update<stochastic_bfloat16, bfloat16, int8_state, bfloat16>"]),
        ({"prior_dtype": "fp8"}, ["update<bfloat16, bfloat16, bfloat16, fp8_code>"]),
        ({"dtype": "float16", "states": "float32"}, ["update<float16, float16, float, float>"]),
        ({"dtype": "float32", "states": "float32"}, ["update<float, float, float, float>"]),
        ({"contender": "triton"}, None),
        ({"prior_device": "cpu"}, None),
        ({"biased_params": 5}, None),
    ],
    ids=str,
)
def test_the_kernels_of_a_step(change: dict[str, Any], kernels: list[str] | None) -> None:
    row = {"contender": "cuda", "scaling": "absolute", "clip": False, "states": "bfloat16", "rounding": "nearest"}
    row |= {"master": False, "prior_dtype": "same", "prior_device": "same", "dtype": "bfloat16"}
    found = kinds.launched({**row, "params": 9, "biased_params": 9, **change})
    assert found is None if kernels is None else found is not None and found[: len(kernels)] == kernels


def run_command(monkeypatch: pytest.MonkeyPatch, sheet: entries.Sheet, *options: object) -> int:
    monkeypatch.setattr(disassembly, "built", lambda: Path("extension.so"))
    monkeypatch.setattr(disassembly, "missing", lambda: None)
    monkeypatch.setattr(disassembly, "architectures", lambda path: machines.ARCHITECTURES)
    monkeypatch.setattr(entries, "make", lambda path, archs: sheet)
    return command.main([str(option) for option in options])


def test_the_command_prints_draws_and_compares(
    sheet: entries.Sheet,
    steps: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, steps)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    before = json.loads(json.dumps(sheet))
    for one in before["kernels"]:
        one["instructions_per_element"] = 71.4
        for machine in one["machines"].values():
            machine["share"] = {"800": 0.41, "1400": 0.32}
    entries.write(before, tmp_path / "before.json")
    options = ["--before", tmp_path / "before.json", "--measured", tmp_path, "--json", tmp_path / "now.json"]
    assert run_command(monkeypatch, sheet, *options, "--plot", tmp_path / "sheet.png") == 0
    out = capsys.readouterr().out
    assert "update bf16, bf16 states, bf16 prior" in out
    assert "71.4 > 4.0" in out
    assert "41/32 > " in out
    assert entries.WHAT in out
    assert len(entries.read(tmp_path / "now.json")["measured"]) == len(measured.compare(sheet, tmp_path))
    (figure,) = figures
    assert "PREDICTED" in figure.get_suptitle()
    panels = {axes.get_title(loc="left").partition(",")[0]: axes for axes in figure.axes}
    assert list(panels) == ["A100", "H100", "H200", "B200"]
    points = [x for line in panels["H200"].lines if line.get_marker() == "D" for x in line.get_xdata()]
    assert len(points) == 7  # a point for each mode that is one launch, with the prior or without
    assert not [x for line in panels["B200"].lines if line.get_marker() == "D" for x in line.get_xdata()]


def test_it_says_why_there_is_no_sheet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(disassembly, "built", lambda: None)
    assert command.main([]) == 1
    assert "No sheet: drift_kernels._cuda was not built" in capsys.readouterr().err


# What was built, and what was kept


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
    """Eight elements a turn for updates, sixteen for sums and the bias: with bytes that are those of the dtypes."""
    assert len(built) > 100
    for one in built:
        turned = {"update": 8, "sum": 16, "bias": 16}[one.name.partition("<")[0]]
        assert (one.elements, one.threads) == (turned, 256), one.name
        assert not [remark for remark in one.remarks() if "elements a turn" in remark or "taken for" in remark], (
            one.name
        )
        assert one.path.calls == 0, one.name


def test_a_known_kernel(built: list[Kernel]) -> None:
    one = next(one for one in built if one.name == BF16)
    assert [step.name for step in one.path.streams] == ["LDG"] * 5 + ["STG"] * 3
    assert {step.width for step in one.path.streams} == {16}
    assert one.path.pipes()["FP32"] >= 8 * 20  # the operations of docs/numerics.md, some fused into roots and divisions
    shares = [predict(one, machine, ns).share for machine in MACHINES if machine.arch == one.arch for ns in (800, 1400)]
    assert all(0.3 < share <= 1 for share in shares)


def test_the_sheet_that_is_kept_is_of_this_model() -> None:
    """Whoever changes a constant predicts anew."""
    kept = entries.read(RESULTS / "gpu-sheet.json")
    assert kept["what"] == entries.WHAT
    assert kept["constants"] == json.loads(json.dumps(machines.constants()))
    found = entries.by_kernel(kept)
    assert set(found) >= {(arch, name) for arch in machines.ARCHITECTURES for name in HEADLINES}
