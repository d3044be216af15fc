"""examples/digit_sums: runs in processes, choices, intervals, tables, figures and the command line."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from rich.console import Console
from scipy import stats

pytest.importorskip("sklearn")
pytest.importorskip("peft")

from test_digit_sums import TINY

from examples.digit_sums import __main__ as command
from examples.digit_sums import figures, report
from examples.digit_sums.analysis import SCORES, Choice, answer, choose, front, mean_and_interval
from examples.digit_sums.cells import Cell, Cells
from examples.digit_sums.experiments import ADAPTERS, DEMO, EXPERIMENTS, FORMS, Entry, Experiment, entries, sweep
from examples.digit_sums.parallel import Pool, noting_interrupts
from examples.digit_sums.settings import TUNING_SEEDS, Arm, Run, Settings, World

ROOT = Path(__file__).parent.parent
MADE_BY = {"commit": "abc", "dirty": False, "device": "a CPU", "torch": "2"}
CLEAN = World()


class MadeUp:
    """Replaces a Pool: computes scores by a formula, and records the requests."""

    settings = Settings()

    def __init__(self) -> None:
        self.asked: list[Run] = []

    def cells_of(self, runs: Iterable[Run], what: str) -> dict[Run, Cell]:
        runs = list(runs)
        self.asked += runs
        return {run: self._cell(run) for run in runs}

    def _cell(self, run: Run) -> Cell:
        best = 10.0 if run.world.family == "llava" else 2.0
        sums = (
            0.5 - 0.01 * abs(run.arm.alpha - best) + 0.01 * (run.seed % 7) + 0.1 * run.arm.merge - run.world.noise / 5
        )
        scores = dict.fromkeys(SCORES, 0.25) | {"held_out_sums": sums}
        return {"scores": scores, "loss": [(10, 2.0 + run.seed), (20, 1.0)], "seconds": 2.0, "made_by": MADE_BY}

    def expert_scores(self, seeds: Iterable[int], world: World) -> list[float]:
        return [1.0 for _ in seeds]


SMALL = Experiment(
    "Does it?",
    (
        *entries("SFT"),
        Entry("pull", sweep(Arm(scaling="gradnorm"), alpha=(1.0, 2.0, 4.0))),
        *(Entry("noisy", (Arm(),), World(noise=share), x=share) for share in (0.1, 0.2)),
        *(Entry("noisy merge", (Arm(merge=1.0),), World(noise=share), x=share) for share in (0.1, 0.2)),
        Entry("elsewhere", sweep(Arm(scaling="gradnorm"), alpha=(2.0, 8.0)), World("llava")),
        Entry("half of it", sweep(Arm(scaling="gradnorm"), alpha=(1.0, 2.0, 4.0)), then=(("prior_rank", 4),)),
    ),
    references=("SFT", "noisy"),
    figures=("dots", "lines", "front", "loss"),
    x_label="noise",
)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return answer("small", SMALL, range(10), MadeUp())


def by_name(result: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in result["entries"]}


def test_settings_are_chosen_on_seeds_of_their_own():
    pool = MadeUp()
    choices, cells = choose(SMALL.entries, pool, "small")
    assert cells.keys() == set(pool.asked)
    assert {run.seed for run in pool.asked} == set(TUNING_SEEDS)
    chosen = {entry.line: choice.tried[choice.best][0].alpha for entry, choice in choices.items()}
    assert chosen == {"SFT": 0.0, "pull": 2.0, "elsewhere": 8.0, "half of it": 2.0}
    assert all(run.world.noise == 0 for run in pool.asked)


def test_what_is_chosen_is_best_in_sums_and_readings_together():
    def scores(held_out: float, seen: float, read: float) -> dict[str, list[float]]:
        return {"held_out_sums": [held_out], "seen_sums": [seen], "reading": [read], "single_digits": [1 - read]}

    def chosen(*tried: dict[str, list[float]]) -> int:
        return Choice(tuple((Arm(), each) for each in tried)).best

    assert chosen(scores(0.5, 0.9, 0.9), scores(0.6, 0.9, 0.9)) == 1
    assert chosen(scores(0.5, 0.9, 0.9), scores(0.6, 0.7, 0.9)) == 0
    assert chosen(scores(0.5, 0.9, 0.9), scores(0.6, 0.9, 0.7)) == 0
    assert chosen(scores(0.5, 0.9, 0.9), scores(0.5, 0.9, 0.9)) == 0


def test_an_answer_reports_the_chosen_arm_on_other_seeds(result: dict[str, Any]):
    found = by_name(result)
    assert found["pull"]["arm"]["alpha"] == 2.0
    assert found["half of it"]["arm"] == {**found["pull"]["arm"], "prior_rank": 4}
    assert [len(tried["scores"]["held_out_sums"]) for tried in found["pull"]["tried"]] == [3, 3, 3]
    assert found["pull"]["scores"]["held_out_sums"]["seeds"] == pytest.approx([0.5 + 0.01 * (s % 7) for s in range(10)])
    assert found["SFT"]["loss"] == [(10, 6.5), (20, 1.0)]
    assert result["made_by"] == [MADE_BY]
    assert result["run_seconds"] == 2 * (10 * len(SMALL.entries) + 3 * (5 + 3 + 2))
    assert {entry["name"]: entry["lr"] for entry in result["entries"]}["pull"] == 5e-4


def test_differences_are_paired_and_at_the_same_place(result: dict[str, Any]):
    found = by_name(result)
    merged = found["noisy merge, 0.1"]["against"]
    assert merged["noisy"]["held_out_sums"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert merged["SFT"]["held_out_sums"]["mean"] == pytest.approx(0.1 - 0.02)  # it has no x
    assert found["noisy, 0.2"]["against"].keys() == {"SFT"}
    assert found["SFT"]["against"] == {}
    assert found["pull"]["against"].keys() == {"SFT"}


def test_intervals_cover_as_often_as_they_say(seed: int, monkeypatch: pytest.MonkeyPatch):
    """With 1,000 samples of ten: there BCa covers 89.5 %, with intervals shorter than Student's by a fifth."""
    monkeypatch.setattr("examples.digit_sums.analysis.RESAMPLES", 1000)
    samples = numpy.random.default_rng(seed).normal(1.0, 2.0, (1000, 10))
    found = [mean_and_interval(list(sample)) for sample in samples]
    covered = sum(interval["low"] <= 1.0 <= interval["high"] for interval in found) / len(found)
    assert 0.82 < covered < 0.96  # from 6.7 standard errors, of 0.97 %: outside once in 1e12 runs
    widths = [interval["high"] - interval["low"] for interval in found]
    student = [2 * stats.t.ppf(0.975, 9) * sample.std(ddof=1) / 10**0.5 for sample in samples]
    assert 0.78 < numpy.median(widths) / numpy.median(student) < 0.86  # 0.817, with a standard error of 0.004


def test_intervals_of_few_and_of_equal_values():
    assert mean_and_interval([0.25] * 4) == {"mean": 0.25, "low": None, "high": None}
    assert mean_and_interval([0.25] * 5) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_front():
    points = {
        "a": (1.0, 5.0),
        "b": (2.0, 4.0),
        "under b": (2.0, 3.0),
        "c": (3.0, 1.0),
        "worst": (0.0, 0.0),
        "as c": (3.0, 1.0),
    }
    assert front(points) == ["a", "b", "c", "as c"]


def test_tables(result: dict[str, Any]):
    heading, *body = report.rows(result, ("held_out_sums", "reading"))
    assert heading == [
        "",
        "setting",
        "held-out sums",
        "reading",
        "held-out sums, against SFT",
        "held-out sums, against noisy",
    ]
    rows = {row[0]: row for row in body}
    assert rows["pull"][1] == "alpha 2, lr 5e-4"
    assert rows["noisy merge, 0.1"][1] == "weight 1, lr 5e-4"
    assert rows["noisy merge, 0.1"][3] == "25.0 [25.0, 25.0]"
    assert rows["noisy merge, 0.1"][5] == "+10.0 [+10.0, +10.0]"
    assert rows["SFT"][4:] == ["", ""]
    assert report.table(result, ("held_out_sums",)).row_count == len(SMALL.entries)
    lines = report.markdown(result, ("held_out_sums", "reading")).splitlines()
    assert len(lines) == 2 + len(SMALL.entries)
    assert {line.count("|") for line in lines} == {7}


def test_json_is_what_was_found(result: dict[str, Any], tmp_path: Path):
    path = report.write_json(tmp_path, result)
    assert path == tmp_path / "small.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert '"seeds": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]' in path.read_text()


def test_figures_of_every_kind(result: dict[str, Any], tmp_path: Path):
    written = figures.draw(tmp_path, json.loads(json.dumps(result)), SMALL)
    assert [path.name for path in written] == [
        f"small-{kind}.{ending}" for kind in ("dots", "lines", "front", "loss") for ending in ("png", "pdf")
    ]
    assert all(path.stat().st_size > 5000 for path in written)
    again = figures.draw(tmp_path / ".." / tmp_path.name, result, SMALL)
    pdf = written[1].read_bytes()
    assert again[1].read_bytes() == pdf


def test_experiments_are_sound():
    for experiment in (DEMO, *EXPERIMENTS.values()):
        names = [entry.name for entry in experiment.entries]
        assert len(set(names)) == len(names)
        assert set(experiment.references) <= {entry.line for entry in experiment.entries}
        assert set(experiment.scores) <= SCORES.keys()
        assert experiment.x_label or "lines" not in experiment.figures
        for entry in experiment.entries:
            assert len(set(entry.candidates)) == len(entry.candidates)
    assert all(len(entry.candidates) == 1 for entry in DEMO.entries)
    rivals = ("SFT", "merge, then SFT", "TIES, then SFT", "expert's weights, then SFT")
    assert all(len(FORMS[name]) >= 4 for name in rivals)
    assert len(ADAPTERS["LoRA: merge, then SFT"]) >= 4


def test_cells_keep_runs_apart(tmp_path: Path):
    cells = Cells(tmp_path, TINY)
    runs = [
        Run(seed, world, arm) for seed in (0, 1) for world in (CLEAN, World(noise=0.5)) for arm in (Arm(), Arm(lr=1.0))
    ]
    for i, run in enumerate(runs):
        assert cells.get(run) is None
        cells.put(run, {"scores": i})
    assert [Cells(tmp_path, TINY).get(run)["scores"] for run in runs] == list(range(8))
    assert len(list((tmp_path / "runs").glob("*.json"))) == 8


def test_results_of_other_settings_are_refused(tmp_path: Path):
    before = Cells(tmp_path, TINY)
    before.put(Run(0, CLEAN, Arm()), {"scores": 1})
    with pytest.raises(ValueError, match=f"under {tmp_path} have other settings than expected: use another --out"):
        Cells(tmp_path, replace(TINY, tuning_examples=33))
    assert Cells(tmp_path, TINY).get(Run(0, CLEAN, Arm())) is not None


def test_a_pool_runs_what_is_missing_in_processes(tmp_path: Path):
    """Called twice: the second call uses what the first made, although it could not be made again."""
    runs = [Run(seed, CLEAN, arm) for seed in (0, 1) for arm in (Arm(), Arm(scaling="gradnorm", alpha=1.0))]
    pool = Pool(TINY, tmp_path, MADE_BY, Console(quiet=True))
    first = pool.cells_of(runs[:3], "some")
    assert [cell["made_by"] for cell in first.values()] == [MADE_BY] * 3
    assert pool.expert_scores((0, 1), CLEAN) == [0.0, 0.0]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    console = Console(file=io.StringIO())
    again = Pool(TINY, tmp_path, {**MADE_BY, "commit": "def"}, console).cells_of(runs, "all")
    assert "all: 3 of 4 runs are already done" in console.file.getvalue()
    assert {run: again[run] for run in runs[:3]} == first
    assert again[runs[3]]["made_by"]["commit"] == "def"
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_error_in_a_process_is_raised_and_nothing_is_kept(tmp_path: Path):
    pool = Pool(TINY, tmp_path, MADE_BY, Console(quiet=True))
    with pytest.raises(ValueError, match="no such scaling"):
        pool.cells_of([Run(0, CLEAN, Arm(scaling="no such scaling", alpha=1.0))], "wrong")
    assert list((tmp_path / "runs").glob("*.json")) == []


def test_the_command_refuses_a_folder_of_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Cells(tmp_path, TINY)
    assert command.main(["--experiment", "main", "--out", str(tmp_path)]) == 2
    assert "use another --out" in capsys.readouterr().err


def test_the_command_line_runs_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int | None]] = []
    monkeypatch.setattr(command, "run_experiment", lambda name, seeds, *others: asked.append((name, seeds)))
    for arguments in ([], ["--all"], ["--experiment", "noise", "ranks", "--seeds", "3"]):
        assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    assert asked == [("demo", None), *((name, None) for name in EXPERIMENTS), ("noise", 3), ("ranks", 3)]


def test_an_experiment_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(command.EXPERIMENTS, "small", SMALL)
    console = Console(record=True, width=200)
    command.run_experiment("small", None, tmp_path, MadeUp(), console)
    found = json.loads((tmp_path / "small.json").read_text())
    assert found["command"] == "python -m examples.digit_sums --experiment small"
    assert found["seeds"] == list(range(10))
    assert (tmp_path / "small-dots.png").exists()
    printed = console.export_text()
    assert "Does it? (in %, means of 10 seeds [95 %])" in printed
    assert "held-out sums: digit pairs whose sum no image example showed" in printed


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_stopped_leaves_no_process_behind(signum: signal.Signals, tmp_path: Path):
    run = [sys.executable, "-m", "examples.digit_sums", "--out", str(tmp_path)]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        parent = psutil.Process(process.pid)
        until(lambda: any(tmp_path.glob("qwen2_5_vl-seed-0/.base*")), "a worker has begun")
        workers = parent.children(recursive=True)
        process.send_signal(signum)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == (130 if signum == signal.SIGINT else -signum)
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []
    assert ("run the same command to resume" in printed) == (signum == signal.SIGINT)
    assert list(tmp_path.glob("runs/*.json")) == []


def test_ctrl_c_is_raised_where_no_lock_is_held():
    with pytest.raises(KeyboardInterrupt), noting_interrupts() as interrupted:
        reached = [signal.raise_signal(signal.SIGINT), *interrupted]
    assert reached == [None, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(4000):  # a busy machine may take a minute for the imports
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"not true after several minutes: {what}")


@pytest.mark.parametrize(
    "arguments", [["--experiment", "nothing"], ["--seeds", "0"], ["--seeds", "1001"], ["--all", "--experiment", "main"]]
)
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert arguments[0] in capsys.readouterr().err
