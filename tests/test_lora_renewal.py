"""Renewing the deltas of adapters as the adapters change: when, where, and in a run that stops and resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import adapted_model, deltas, gradients, loss_of, train
from torch import Tensor, nn

from benchmarks import adapters as benchmark
from drift_kernels import FusedDriftAdamW, GradientBias, attach_prior
from drift_kernels.engine import engine, projecting
from drift_kernels.integrations import named_groups
from drift_kernels.integrations.peft import lora_prior


def bound(optimizer: FusedDriftAdamW) -> dict[str, Tensor]:
    return {
        slot.name: slot.bound.delta
        for batch in optimizer._engine.batches
        for slot in batch.slots
        if slot.bound is not None
    }


@pytest.mark.parametrize("refresh", [2, 3])
def test_deltas_are_renewed_in_place_in_every_kth_step(refresh: int) -> None:
    model = adapted_model()
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas(), refresh=refresh), lr=1e-2)
    seen, places = [], []
    for step in range(7):
        train(model, optimizer, step, step + 1)
        deltas_now = bound(optimizer)
        seen.append({name: delta.clone() for name, delta in deltas_now.items()})
        places.append([delta.data_ptr() for delta in deltas_now.values()])
    assert all(place == places[0] for place in places)
    for step in range(1, 7):
        same = [torch.equal(seen[step][name], seen[step - 1][name]) for name in seen[0]]
        assert not any(same) if step % refresh == 0 else all(same), step


def test_a_graph_renews_in_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model()
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas(), refresh=2), capturable=True)
    train(model, optimizer, 0, 1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    monkeypatch.setattr(engine, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="only in every replay: refresh must be 1, got 2"):
        train(model, optimizer, 1, 2)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_prior_that_does_not_act_is_not_renewed() -> None:
    model = adapted_model()
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas()), alpha=0.0)
    train(model, optimizer, 0, 2)
    assert not any(delta.any() for delta in bound(optimizer).values())


def test_the_delta_over_a_frozen_a_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = projecting.projected
    monkeypatch.setattr(projecting, "projected", lambda *args, **options: calls.append(1) or original(*args, **options))
    model = adapted_model(target_modules=["q_proj"])
    for name, param in model.named_parameters():
        param.requires_grad_("lora_B" in name)
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas()))
    train(model, optimizer, 0, 3)
    assert len(calls) == 2, "one for each of two layers"
    with torch.no_grad():
        next(param for name, param in model.named_parameters() if "lora_A" in name).mul_(2)
    train(model, optimizer, 3, 5)
    assert len(calls) == 3, "a frozen A that was written to"


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:bfloat16 states")
def test_a_run_resumes_bit_for_bit(refresh: int, stop: int, dtype: torch.dtype, tmp_path: Any) -> None:
    """Also between two renewals."""

    def start() -> tuple[nn.Module, FusedDriftAdamW]:
        model = adapted_model().to(dtype)
        prior = lora_prior(model, deltas(), refresh=refresh)
        return model, FusedDriftAdamW(named_groups(model), prior=prior, lr=1e-2, max_grad_norm=1.0)

    model, optimizer = start()
    expected = train(model, optimizer, 0, 7)
    model, optimizer = start()
    train(model, optimizer, 0, stop)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    model, optimizer = start()
    train(model, optimizer, 0, 2)  # elsewhere
    saved = torch.load(tmp_path / "saved.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for name, found in train(model, optimizer, stop, 7).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("scaling", ["gradnorm", "absolute"])
def test_steps_in_the_backward_pass_are_those_after_it(scaling: str) -> None:
    results = []
    for attached in (False, True):
        model = adapted_model()
        optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas()), prior_scaling=scaling)
        if attached:
            optimizer.attach_to_backward()
        results.append(train(model, optimizer, 0, 3))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_hooks_bias_as_all_together() -> None:
    model, other = adapted_model(), adapted_model()
    bias = GradientBias(model.named_parameters(), lora_prior(model, deltas()))
    hooks = attach_prior(other, lora_prior(other, deltas()))
    for step in range(2):
        for each in (model, other):
            each.zero_grad()
            loss_of(each, step).backward()
        bias.apply_()
        expected = gradients(model)
        for name, grad in gradients(other).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-8)
        for each in (model, other):
            with torch.no_grad():
                for param in each.parameters():
                    if param.grad is not None:
                        param -= 0.1 * param.grad
    hooks.remove()


def test_a_state_without_deltas_has_them_renewed_at_once() -> None:
    """From torch.distributed.checkpoint, or from an optimizer that renewed in every step; also between two renewals."""

    def start(refresh: int) -> tuple[nn.Module, FusedDriftAdamW]:
        model = adapted_model()
        return model, FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas(), refresh=refresh), lr=1e-2)

    model, optimizer = start(3)
    train(model, optimizer, 0, 4)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["prior_delta"]
    results = []
    for refresh in (3, 1):
        model, optimizer = start(refresh)
        train(model, optimizer, 0, 2)
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        results.append(train(model, optimizer, 4, 5))
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name


def test_the_benchmark_of_renewals(tmp_path: Path) -> None:
    benchmark.main(["--scale", "64", "--rank", "2", "--reps", "2", "--device", "cpu", "--json", str(tmp_path / "rows")])
    rows = {row["kind"]: row for row in json.loads((tmp_path / "rows").read_text())}
    assert list(rows) == ["reading bf16", "no prior", "bf16", "int8", "rank 64"]
    assert rows["reading bf16"]["ratio_to_reading"] == 1
    assert {row["elements"] for row in rows.values()} == {2 * 56 * 56 + 2 * 8 * 56 + 3 * 296 * 56}
