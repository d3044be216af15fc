"""`make gpu`: its runner with real processes, its stages, its targets, and its message without a GPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import sanitize, stages, suite, targets
from benchmarks.gpu.stages import FAILED, NOT_RUN, OK, Outcome, Stage, run_stages
from benchmarks.step import command, lineup, shapes

ROOT = Path(__file__).parents[1]
FREE = 84_000_000_000  # bytes, of a GPU of 80 GB

# Seconds, for a busy machine; processes stopped here would run for twice as long.
PATIENCE, ENDLESS = 300, 600


def python(name: str, code: str, seconds: float = PATIENCE, **options) -> Stage:
    return Stage(name, [sys.executable, "-c", code], seconds, **options)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} is not written"
        time.sleep(0.02)
    return path.read_text()


def wait_for_the_end_of(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while is_alive(pid):
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.02)


# The runner


def test_each_stage_ends_in_its_own_way(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    seen: list[int] = []
    outcomes = run_stages(
        [
            python("good", "import os; print('hello', os.environ['WORD'])", env={"WORD": "there"}),
            python("bad", "import sys; print('oh'); sys.exit(3)"),
            python(
                "refused", "import sys; print('===== Device not supported'); sys.exit(1)", refusals=("not supported",)
            ),
            python("fine", "print('Device not supported')", refusals=("not supported",)),
            python("missing", "raise SystemExit(1)", missing="no such tool"),
            Stage("no program", [str(tmp_path / "no-program")], PATIENCE),
            python("after bad", "", needs=("good", "bad")),
            python("after good", "", needs=("good",)),
        ],
        budget=8 * PATIENCE,
        log=log,
        cwd=tmp_path,
        ended=lambda outcomes: seen.append(len(outcomes)),
    )
    assert [(outcome.name, outcome.status, outcome.reason) for outcome in outcomes[:5]] == [
        ("good", OK, None),
        ("bad", FAILED, "exit status 3"),
        ("refused", NOT_RUN, "Device not supported"),
        ("fine", OK, None),
        ("missing", NOT_RUN, "no such tool"),
    ]
    assert (outcomes[5].status, "No such file" in outcomes[5].reason) == (FAILED, True)
    assert (outcomes[6].status, outcomes[6].reason) == (NOT_RUN, "needs bad")
    assert outcomes[7].status == OK
    assert seen == list(range(1, 9))
    text = log.read_text()
    assert text.index("hello there") < text.index("\noh\n") < text.index("===== Device")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_stage_that_takes_too_long_ends_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell and its child. Its second begins when both are there, however busy the machine is."""

    class Started(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                wait_for(tmp_path / "pid")
            return super().wait(timeout)

    monkeypatch.setattr(stages.subprocess, "Popen", Started)
    slow = Stage("slow", ["sh", "-c", f"sleep {ENDLESS} & echo $! > {shlex.quote(str(tmp_path / 'pid'))}; wait"], 1)
    start = time.monotonic()
    outcomes = run_stages([slow, python("next", "print('next')")], 2 * PATIENCE, tmp_path / "log", tmp_path)
    assert [outcome.status for outcome in outcomes] == [FAILED, OK]
    assert outcomes[0].reason == "stopped after 1 s"
    assert 1 <= outcomes[0].seconds < PATIENCE
    assert time.monotonic() - start < ENDLESS
    wait_for_the_end_of(int((tmp_path / "pid").read_text()))


def test_the_budget_bounds_all_stages_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock counts only the limits of the stages that ran, however busy the machine is."""
    sleep, start, run, used = f"import time; time.sleep({ENDLESS})", time.monotonic(), stages._run, []

    def counted(stage: Stage, seconds: float, *others: Path) -> Outcome:
        used.append(seconds)
        return run(stage, seconds, *others)

    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: float(sum(used))))
    monkeypatch.setattr(stages, "_run", counted)
    outcomes = run_stages(
        [python("one", sleep), python("two", sleep), python("no tool", "", missing="x")],
        1,
        tmp_path / "log",
        tmp_path,
    )
    assert time.monotonic() - start < PATIENCE
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED, NOT_RUN]
    assert outcomes[0].reason == "stopped after 1 s"
    assert outcomes[1].reason == "the 1 s for all stages are used up"


def test_the_log_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "MAX_OUTPUT_BYTES", 1000)
    log = tmp_path / "log"
    run_stages(
        [python("much", "print('first'); print('x' * 50000); print('last')"), python("next", "print('short')")],
        2 * PATIENCE,
        log,
        tmp_path,
    )
    text = log.read_text()
    assert len(text) < 2000
    assert "[49012 bytes left out]" in text
    assert [word for word in ("first", "last", "short") if f"{word}\n" in text] == ["first", "last", "short"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_stopping_the_runner_stops_its_stage(tmp_path: Path) -> None:
    """From when it waits for it: a signal inside of `Popen` would leave the child without anyone who knows it."""
    program = f"""
import subprocess, sys
from pathlib import Path
from benchmarks.gpu import stages, suite
class Started(subprocess.Popen):
    def wait(self, timeout=None):
        if timeout is not None:
            Path({str(tmp_path / "pid")!r}).write_text(str(self.pid))
        return super().wait(timeout)
stages.subprocess.Popen = Started
suite.find_gpu = lambda: {{"arch": "90", "free": {FREE}}}
suite.make_stages = lambda *_: [stages.Stage("slow", ["sleep", "{ENDLESS}"], {ENDLESS})]
sys.exit(suite.main([{str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pid = int(wait_for(tmp_path / "pid"))
    process.terminate()
    assert process.wait(PATIENCE) == 143
    wait_for_the_end_of(pid)


# The stages


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in suite.make_stages(tmp_path / "out", tmp_path / "work", "90", FREE)}


def test_a_red_build_stops_everything_and_red_parity_the_measuring(made: dict[str, Stage]) -> None:
    assert next(iter(made)) == "build"
    assert made["build"].env == {"DRIFT_KERNELS_CUDA": "1", "DRIFT_KERNELS_CUDA_ARCHS": "90"}
    assert all("build" in stage.needs for name, stage in made.items() if name != "build")
    measuring = {name for name, stage in made.items() if "benchmarks.step" in stage.command}
    assert measuring == set(suite.runs(FREE)) == set(suite.RUN_SECONDS)
    assert measuring == {name for name, stage in made.items() if "parity" in stage.needs}


def test_what_comes_back_is_few_files_in_a_flat_folder(made: dict[str, Stage], tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = {word for stage in made.values() for word in stage.command if word.startswith(str(out))}
    assert all(Path(path).parent == out for path in named)
    assert len(named | {"gpu.json", "log.txt"}) <= 8


def test_the_stages_run_files_and_modules_that_exist(made: dict[str, Stage]) -> None:
    for stage in made.values():
        words = stage.command
        if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
            module = words[words.index("-m") + 1].replace(".", "/")
            assert (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists()
    assert set(made["parity"].command) >= {"tests/test_parity.py"}


@pytest.mark.parametrize("free", [84_000_000_000, 47_000_000_000, 23_000_000_000])
def test_every_run_is_understood_and_fits(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    l2 = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: l2)
    device = torch.device("cuda")
    for options in suite.runs(free).values():
        parser = command.make_parser()
        args = parser.parse_args(["--device", "cuda", *options])
        command.check_arguments(parser, args)
        ours = lineup.chosen_backends(args.contenders, device)
        assert "cuda" in ours
        libraries = [name for name in lineup.libraries.LIBRARIES if name in args.contenders]
        modes = command.chosen_modes(parser, args)
        clips = [name == "yes" for name in args.clip]
        entries = lineup.entries(args.contenders, ours, libraries, args.scaling, clips, torch.bfloat16, modes, device)
        scale = 1.0 if args.layers or args.model == "tiny" else shapes.fit(args.model, args.params)
        named_shapes = shapes.named_shapes(args.model, scale, args.layers)
        assert lineup.needed_bytes(named_shapes, ["all"], torch.bfloat16, entries, True, device) < 0.98 * free


# Targets


def row(**values) -> dict:
    base = {"run": "7b", "contender": "cuda", "scaling": "absolute", "clip": False, "states": "bfloat16"}
    ratios = {f"ratio_to_{name}": None for name in ("fused", "foreach_bias", "hook")}
    mode = {"rounding": "nearest", "master": False, "prior_dtype": "same"}
    return {**base, **mode, **ratios, "percent_of_copy": None, "host_ms": {"median": 5.0}, **values}


def test_targets_are_read_from_the_rows() -> None:
    small = {"run": "modes", "states": "int8", "rounding": "stochastic", "prior_dtype": "int8"}
    rows = [
        row(contender="triton", percent_of_copy=99.0),
        row(run="7b-all", percent_of_copy=99.0),
        row(states="float32", percent_of_copy=90.5, ratio_to_fused={"median": 1.3}),
        row(percent_of_copy=89.0, ratio_to_fused={"median": 1.0}, ratio_to_foreach_bias={"median": 0.71}),
        row(run="tiny", host_ms={"median": 0.15}),
        row(run="modes", states="float32", ms={"median": 3.0}, bytes_per_param=24.0),
        row(run="modes", states="int8", ms={"median": 9.0}, bytes_per_param=13.0),
        row(**small, ms={"median": 2.0}, bytes_per_param=11.16),
    ]
    checked = [target.check(rows) for target in targets.TARGETS]
    assert [(one["measured"], one["met"]) for one in checked] == [
        (90.5, True),
        (89.0, False),
        (1.0, True),
        (0.71, False),
        (None, None),
        (150.0, True),
        (pytest.approx(0.465), True),
        (1.5, False),
    ]
    lines = [targets.describe(one) for one in checked]
    said = [line.rpartition("  ")[2] for line in lines]
    assert said == ["met", "MISSED", "met", "MISSED", "not measured", "met", "met", "MISSED"]
    alone = [row(**small, ms={"median": 2.0}, bytes_per_param=11.16)]
    assert all(target.measured(alone) is None for target in targets.TARGETS)
    assert all(one["met"] is None for one in (target.check([]) for target in targets.TARGETS))


# The whole


def test_a_run_writes_its_results_and_fails_if_a_stage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake_stages(out: Path, work: Path, arch: str, free: int) -> list[Stage]:
        measured = json.dumps([row(percent_of_copy=93.0)] * 2)
        return [
            python("7b", f"open({str(work / '7b.json')!r}, 'w').write({measured!r})"),
            python("tests", f"print('arch {arch}, 1 test failed'); raise SystemExit({status})"),
        ]

    monkeypatch.setattr(suite, "find_gpu", lambda: {"arch": "90", "free": FREE})
    monkeypatch.setattr(suite, "make_stages", fake_stages)
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)
    out = tmp_path / "a" / "out"
    for status in (1, 0):
        assert suite.main([str(out)]) == status
        results = json.loads((out / "gpu.json").read_text())
        assert [stage["status"] for stage in results["stages"]] == [OK, FAILED if status else OK]
        assert [one["run"] for one in results["rows"]] == ["7b", "7b"]
        assert results["targets"][1]["met"] is True
        printed = capsys.readouterr().out
        assert ("1 test failed" in printed) == bool(status)
        assert "93 %  met" in printed
        assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "log.txt"]
    assert str(Outcome("x", FAILED, 1.23, "why")) == "x            failed      1.2 s: why"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails_at_once_with_one_line(tmp_path: Path) -> None:
    command = ["make", "-s", "gpu", f"OUT={tmp_path / 'out'}", f"PYTHON={shlex.quote(sys.executable)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""})
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == ["No GPU run: torch sees no GPU here"]
    assert not (tmp_path / "out").exists()


def test_the_program_for_compute_sanitizer_steps_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu", "--backend", "reference"]) == 0
    assert capsys.readouterr().out == "100 cases of 2 steps on backend 'reference'\n"
    tensors = sanitize.tensors(torch.bfloat16, torch.device("cpu"), 1.0)
    assert {tensor.data_ptr() % 4 for tensor in tensors} == {0, 2}
    assert all(tensor.is_contiguous() for tensor in tensors)
