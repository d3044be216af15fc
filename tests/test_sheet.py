"""benchmarks.gpu.sheet: entries, tables and plot, and predictions beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from listing import BF16, FAST, H200, KERNEL, turn
from matplotlib.figure import Figure

from benchmarks.gpu import disassembly, suite
from benchmarks.gpu.sheet import __main__ as command
from benchmarks.gpu.sheet import entries, kinds, machines, measured
from benchmarks.gpu.sheet.kinds import HEADLINES
from benchmarks.gpu.sheet.model import Kernel, predict

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


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
    rest = {
        "what": entries.WHAT,
        "commit": "0" * 40,
        "dirty": False,
        "date": "",
        "triton": None,
        "compiler": "a compiler",
    }
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


def test_machines_by_the_drivers_names() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB")
    found = [measured.machine_of(name) for name in names]
    assert [machine and machine.name for machine in found] == ["H100", "A100", None, None]


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
    sheet: entries.Sheet,
    steps: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, [{**row, "device": "NVIDIA T4"} for row in steps])
    with pytest.raises(SystemExit):
        run_command(monkeypatch, sheet, "--measured", tmp_path)
    assert "gpu.json has no step of ours with a prediction (NVIDIA T4)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command(monkeypatch, sheet, "--measured", tmp_path / "elsewhere")
    assert "No such file" in capsys.readouterr().err


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
        ({"contender": "triton"}, ["triton update<bfloat16, bfloat16, bfloat16, bfloat16>"]),
        ({"contender": "fused"}, None),
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
    monkeypatch.setattr(entries, "make", lambda path, archs, cubins: sheet)
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


def test_the_sheet_that_is_kept_is_of_this_model() -> None:
    """Whoever changes a constant predicts anew."""
    kept = entries.read(RESULTS / "gpu-sheet.json")
    assert kept["what"] == entries.WHAT
    assert kept["constants"] == json.loads(json.dumps(machines.constants()))
    found = entries.by_kernel(kept)
    assert set(found) >= {(arch, name) for arch in machines.ARCHITECTURES for name in HEADLINES}
