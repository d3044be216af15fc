"""The accuracy benchmark: its modes, their shared settings, its byte counts, and a small run end to end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor

from benchmarks.accuracy import comparison, curves, finetune
from benchmarks.accuracy.finetune import MODES, Mode, SeedRun, Settings
from benchmarks.rows import row_metadata

TINY = Settings(
    lr=1e-3,
    steps=7,
    pretraining_steps=3,
    warmup_steps=2,
    evaluate_every=5,
    batch_size=2,
    length=33,
    hidden=16,
    layers=1,
)
AVAILABLE = tuple(mode for mode in MODES if mode.refusal() is None)
COMMON = {"seconds": 1, "transformers": transformers.__version__, **row_metadata()}


@pytest.fixture(scope="module")
def seed_run() -> SeedRun:
    run = SeedRun(3, TINY, lambda name: None)
    run.held_out = run.held_out[:20]
    return run


@pytest.fixture
def _process_is_restored() -> Iterator[None]:
    """Undo the changes of `comparison.main` to the process, which other tests share."""
    logger = logging.getLogger("drift_kernels")
    threads, level = torch.get_num_threads(), logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


def test_modes_are_named_apart_and_begin_with_the_reference() -> None:
    assert len({mode.name for mode in MODES}) == len(MODES)
    assert MODES[0] == Mode("float32", "float32", torch.float32)
    assert [mode.name for mode in MODES if mode not in AVAILABLE and "int8" not in mode.name] == []


def test_a_mode_that_the_optimizer_does_not_have_says_why() -> None:
    refusal = Mode("bf16", "complex", torch.bfloat16, {"state_dtype": torch.complex64}).refusal()
    assert refusal is not None
    assert "complex64" in refusal


def test_modes_share_start_and_batches(seed_run: SeedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, seen = {}, {}
    loss_of = finetune.loss_of

    def recorded(model: torch.nn.Module, params: finetune.Params, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            starts.setdefault(mode.name, {name: param.detach().double() for name, param in params.items()})
            seen.setdefault(mode.name, []).append(batch)
        return loss_of(model, params, batch)

    monkeypatch.setattr(finetune, "loss_of", recorded)
    for mode in AVAILABLE:
        seed_run.fine_tune(mode)
    reference = MODES[0].name
    for mode in AVAILABLE:
        assert starts[mode.name].keys() == starts[reference].keys()
        assert all(torch.equal(start, starts[reference][name]) for name, start in starts[mode.name].items())
        assert len(seen[mode.name]) == TINY.steps
        assert all(map(torch.equal, seen[mode.name], seen[reference]))
    assert any(not torch.equal(batch, seen[reference][0]) for batch in seen[reference])


def test_held_out_text_is_not_trained_on() -> None:
    run = SeedRun(4, TINY, lambda name: None)
    code = finetune.examples(finetune.texts()[1], TINY.length)
    assert torch.equal(run.held_out, code[::20])
    training = {tuple(row) for i, row in enumerate(code.tolist()) if i % 20}
    assert {tuple(row) for row in run.batches.flatten(0, 1).tolist()} <= training


def test_batches_go_through_every_example() -> None:
    data = torch.arange(7)[:, None].expand(7, 3)
    order = finetune.batches(data, steps=7, batch_size=2, seed=5)[..., 0].flatten()
    assert order[:7].sort().values.tolist() == order[7:].sort().values.tolist() == list(range(7))
    assert not torch.equal(order, finetune.batches(data, steps=7, batch_size=2, seed=6)[..., 0].flatten())


def test_float32_mode_is_torch_adamw(seed_run: SeedRun) -> None:
    ours = seed_run.fine_tune(MODES[0])
    theirs = seed_run.fine_tune(Mode("torch", "float32", torch.float32, ours=False))
    torch.testing.assert_close(ours["training"], theirs["training"], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours["held_out"], theirs["held_out"], rtol=1e-4, atol=0)
    assert ours["bytes"] == theirs["bytes"]


@pytest.mark.parametrize(
    ("weights", "states", "bytes_per_param"),
    [
        ("float32", "float32", 4 + 8),
        ("bf16 nearest", "float32", 2 + 8),
        ("bf16 stochastic", "bf16 stochastic", 2 + 4),
        ("bf16 + master", "float32", 2 + 2 + 8),
        ("bf16 + master", "bf16 nearest", 2 + 2 + 4),
    ],
)
def test_stored_bytes(weights: str, states: str, bytes_per_param: int) -> None:
    mode = next(mode for mode in MODES if (mode.weights, mode.states) == (weights, states))
    params = {name: torch.randn(shape).to(mode.param_dtype) for name, shape in (("w", (63, 17)), ("b", (5,)))}
    optimizer = mode.optimizer([param.requires_grad_() for param in params.values()], lr=1e-3, seed=0)
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    steps = 4 * len(params)  # each tensor's float32 step count
    assert finetune.stored_bytes(params, optimizer) == bytes_per_param * (63 * 17 + 5) + steps


def test_figures_of_the_rows() -> None:
    def record(seed: int, start: float, losses: tuple[float, float]) -> finetune.Record:
        shared = {"training": [start], "bytes": 1200, "params": 100}
        runs = [{"held_out": [(7, loss)], "rounded_loss": 1.01 * loss, **shared} for loss in losses]
        return {"seed": seed, "start_loss": start, "modes": {m.name: r for m, r in zip(MODES, runs, strict=False)}}

    records = [record(0, 3.0, (2.0, 2.5)), record(1, 3.0, (1.0, 1.5))]
    reference, nearest = comparison.make_rows(records, TINY, MODES[:2], COMMON)
    assert reference["difference_percent"] == [0, 0]
    assert reference["rounded_difference_percent"] == pytest.approx([1, 1])
    assert nearest["difference_percent"] == pytest.approx([25, 50])
    assert nearest["gain_percent"] == pytest.approx([50, 75])
    assert nearest["difference_in_spreads"] == pytest.approx(0.5 / 0.5**0.5)
    assert nearest["bytes_per_param"] == 12
    assert nearest["settings"] == asdict(TINY)


def test_one_seed_has_no_spread(seed_run: SeedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = comparison.make_rows([seed_run.run(MODES[:2])], TINY, MODES[:2], COMMON)
    assert [row["difference_in_spreads"] for row in rows] == [None, None]
    comparison.print_table(rows, Console(width=120))
    assert ", 1 seed " in capsys.readouterr().out
    curves.draw(rows, tmp_path / "plot.png")


@pytest.mark.usefixtures("_process_is_restored")
def test_rows_are_printed_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "SHORT", {name: value for name, value in asdict(TINY).items() if name != "lr"})
    files = rows_file, plot_file = tmp_path / "rows.json", tmp_path / "plot.png"
    comparison.main(["--short", "--json", str(rows_file), "--plot", str(plot_file)])
    rows = json.loads(rows_file.read_text())
    assert [row["mode"] for row in rows] == [mode.name for mode in AVAILABLE]
    assert {"commit", "torch", "device", "settings", "text"} <= rows[0].keys()
    printed = capsys.readouterr().out
    assert all(row["weights"] in printed for row in rows)
    assert printed.count("Left out:") == len(MODES) - len(AVAILABLE)
    assert all(file.stat().st_size > 1000 for file in files)
    curves.main([str(rows_file), str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").stat().st_size == plot_file.stat().st_size
