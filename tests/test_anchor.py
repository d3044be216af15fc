"""Fading pulls: anchor=True is a prior of the remaining distance, recomputed in every step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from lora import adapted_model, deltas, loss_of, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training import KINDS, Run, agree, fsdp_model, make_model, make_prior
from training import loss_of as loss_of_layers

from drift_kernels import FusedDriftAdamW, PriorError
from drift_kernels.adapters import Factors, made, merged, projected
from drift_kernels.integrations import named_groups
from drift_kernels.integrations.peft import lora_prior

BF16 = torch.bfloat16
STEPS = 4


def prior_of_what_is_left(model: nn.Module, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: targets[name] - p.detach() for name, p in model.named_parameters() if name in targets}


def steps_of_their_own(dtype: torch.dtype, kind: dict[str, Any], scaling: str, alpha: float) -> list[Tensor]:
    """Take each step with a new optimizer, whose prior is the remaining distance, and which has the previous states."""
    model, prior = make_model(dtype), make_prior()
    params = dict(model.named_parameters())
    targets = {name: (params[name].detach().float() + delta.float()).to(dtype) for name, delta in prior.items()}
    state: Any = None
    for step in range(STEPS):
        optimizer = FusedDriftAdamW(
            model.named_parameters(), lr=1e-2, prior=prior_of_what_is_left(model, targets), prior_scaling=scaling,
            alpha=alpha, seed=5, **kind,
        )  # fmt: skip
        if state is not None:
            optimizer.load_state_dict(state)
        model.zero_grad()
        loss_of_layers(model, step, dtype).backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            del group["prior_fingerprint"]
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("scaling", ["absolute", "decoupled"])
@pytest.mark.parametrize(("kind", "dtype"), [("float32", torch.float32), *((kind, BF16) for kind in KINDS)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_is_one_with_a_prior_of_what_is_left(scaling: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    """Bitwise: no coefficient depends on norms."""
    options = {**KINDS[kind], "backend": backend}
    alpha = 5.0 if scaling == "decoupled" else 0.5
    expected = steps_of_their_own(dtype, options, scaling, alpha)
    model = make_model(dtype)
    optimizer = FusedDriftAdamW(
        model.named_parameters(), lr=1e-2, prior=make_prior(), prior_scaling=scaling, alpha=alpha, seed=5, anchor=True,
        **options,
    )  # fmt: skip
    for step in range(STEPS):
        model.zero_grad()
        loss_of_layers(model, step, dtype).backward()
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), expected))


@pytest.mark.parametrize("scaling", ["gradnorm", "adaptive_cosine"])
def test_a_pull_by_norms_fades_too(scaling: str) -> None:
    """The cosine is that of the remaining distance; the norm is divided by that of the whole delta."""
    model, alpha = make_model(torch.float32), 0.5
    targets = {
        name: param.detach() + make_prior()[name] for name, param in model.named_parameters() if "bias" not in name
    }
    optimizer = FusedDriftAdamW(
        model.named_parameters(), lr=1e-2, prior=make_prior(), prior_scaling=scaling, alpha=alpha, anchor=True
    )
    for step in range(STEPS):
        model.zero_grad()
        loss_of_layers(model, step, torch.float32).backward()
        left = prior_of_what_is_left(model, targets)
        grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
        figures = zip(optimizer.prior_names, optimizer.prior_cosine, optimizer.prior_ratio, strict=True)
        for name, cosine, ratio in figures:
            delta, grad = left[name].double().flatten(), grads[name].double().flatten()
            expected = float(delta @ grad / (delta.norm() * grad.norm()))
            assert float(cosine) == pytest.approx(expected, abs=1e-6)
            fading = float(delta.norm() / make_prior()[name].double().norm())
            share = alpha * fading * (1 if scaling == "gradnorm" else (1 + expected) / 2)
            assert float(ratio) == pytest.approx(share, abs=1e-6)


def test_the_pull_ends_where_the_expert_is() -> None:
    param = nn.Parameter(torch.randn(300, 40))
    start, delta = param.detach().clone(), torch.randn(300, 40)
    optimizer = FusedDriftAdamW(
        [("w", param)], lr=0.1, weight_decay=0.0, prior={"w": delta}, prior_scaling="decoupled", alpha=1.0, anchor=True
    )
    param.grad = torch.zeros_like(param)
    for step in range(1, 80):
        optimizer.step()
        expected = start + (1 - 0.9**step) * delta
        torch.testing.assert_close(param.detach(), expected, rtol=1e-4, atol=1e-4)


def test_its_memory_is_a_target_and_a_delta() -> None:
    model = make_model(BF16)
    optimizer = FusedDriftAdamW(model.named_parameters(), prior=make_prior(), prior_scaling="absolute", anchor=True)
    loss_of_layers(model, 0).backward()
    optimizer.step()
    covered = sum(p.numel() for name, p in model.named_parameters() if name in make_prior())
    elements = sum(p.numel() for p in model.parameters())
    assert optimizer.memory_report()["prior"] == pytest.approx(2 * 2 * covered / elements)
    held = optimizer._engine.binding._bound.values()
    assert all(bound.norm is not None for bound in held), "the prior's own deltas are gone"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    options = {**KINDS[kind], "anchor": True, "prior_scaling": "adaptive_cosine"}
    straight, first = Run(make_model(), **options), Run(make_model(), **options)
    straight.steps(0, 6)
    first.steps(0, 3)
    torch.save([first.model.state_dict(), first.optimizer.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt")
    again = Run(make_model(), **options)
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(state)
    for schedule, done in ((again.lr, first.lr), (again.alpha, first.alpha)):
        schedule.load_state_dict(done.state_dict())
    again.steps(3, 6)
    agree(again.result(), straight.result())


def sharded_and_resumed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Resume with torch.distributed.checkpoint."""
    options = {"anchor": True}
    run = Run(fsdp_model(), **options)
    run.steps(0, 3)
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(folder))
    again = Run(fsdp_model(), **options)
    model_state, optimizer_state = get_state_dict(again.model, again.optimizer)
    found = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(found, checkpoint_id=str(folder))
    set_state_dict(again.model, again.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    for schedule, done in ((again.lr, run.lr), (again.alpha, run.alpha)):
        schedule.load_state_dict(done.state_dict())
    for each in (run, again):
        each.steps(3, 6)
    return run.result(), again.result()


def test_shards_and_their_checkpoints(tmp_path: Path) -> None:
    plain = Run(make_model(), anchor=True)
    plain.steps(0, 6)
    for straight, resumed in ranks.run(sharded_and_resumed, 2, tmp_path, tmp_path / "checkpoint"):
        agree(straight, plain.result())
        agree(resumed, straight)


def test_steps_in_the_backward_pass_and_states_that_were_emptied() -> None:
    results = []
    for how in ("after", "in", "emptied"):
        model = make_model(torch.float32)
        optimizer = FusedDriftAdamW(
            model.named_parameters(), lr=1e-2, prior=make_prior(), anchor=True, prior_scaling="decoupled", alpha=5.0
        )
        if how == "in":
            optimizer.attach_to_backward()
        for step in range(3):
            model.zero_grad()
            loss_of_layers(model, step, torch.float32).backward()
            optimizer.step()
            if how == "emptied":
                targets = {name: optimizer.state[p]["prior_target"].clone() for name, p in model.named_parameters()
                           if name in make_prior()}  # fmt: skip
                optimizer.state.clear()
        results.append([param.detach().clone() for param in model.parameters()])
        params = dict(model.named_parameters())
    assert all(map(torch.equal, results[0], results[1]))
    optimizer.state.clear()
    loss_of_layers(model, 3, torch.float32).backward()
    optimizer.step()
    assert all(torch.equal(optimizer.state[params[name]]["prior_target"], target) for name, target in targets.items())


# Adapters


@pytest.mark.parametrize("transposed", [False, True])
def test_what_adapters_have_made_of_a_delta_is_taken_off(transposed: bool) -> None:
    m, n, rank = (37, 50, 3)
    a, b = torch.randn(rank, n, dtype=torch.float64), torch.randn(m, rank, dtype=torch.float64)
    factors = Factors(a, b, 1.3, transposed=transposed)
    delta = torch.randn(m, n, dtype=torch.float64)
    left = delta - 1.3 * b @ a
    stored = delta.T.contiguous() if transposed else delta
    to_a, to_b = (whole - off for whole, off in zip(projected(stored, factors), made(factors), strict=True))
    torch.testing.assert_close(to_a, 1.3 * b.T @ left, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to_b, 1.3 * left @ a.T, rtol=1e-12, atol=1e-12)
    moved = 1.3 * (merged(stored, factors) - b) @ a
    torch.testing.assert_close(moved, left @ torch.linalg.pinv(a) @ a, rtol=1e-7, atol=1e-7)


def test_adapters_end_where_the_expert_is_as_far_as_they_reach() -> None:
    """B converges to delta A^+/s, however long the run; without an anchor it would not stop there."""
    model, prior = adapted_model(target_modules=["q_proj"]), deltas(which="q_proj.weight")
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
    optimizer = FusedDriftAdamW(
        named_groups(model, 0.0), lr=0.1, prior=lora_prior(model, prior), prior_scaling="decoupled", alpha=1.0,
        anchor=True,
    )  # fmt: skip
    for _ in range(150):
        optimizer.step()
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (getattr(layer, factor)["default"].weight.detach() for factor in ("lora_A", "lora_B"))
            expected = prior[f"{name.removeprefix('base_model.model.')}.weight"] @ torch.linalg.pinv(a)
            torch.testing.assert_close(layer.scaling["default"] * b, expected, rtol=1e-3, atol=1e-4)


def test_the_pull_of_adapters_by_norms_fades_too() -> None:
    model, prior = adapted_model(target_modules=["q_proj"]), deltas(which="q_proj.weight")
    optimizer = FusedDriftAdamW(
        named_groups(model), prior=lora_prior(model, prior), prior_scaling="gradnorm", lr=1e-2, anchor=True
    )
    for step in range(2):
        before = {name: layer_factors(layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        train(model, optimizer, step, step + 1)
    ratios = dict(zip(optimizer.prior_names, optimizer.prior_ratio, strict=True))
    for name, (a, b, scale) in before.items():
        delta = prior[f"{name.removeprefix('base_model.model.')}.weight"].double()
        left = delta - scale * b @ a
        for factor, whole, rest in (("A", b.T @ delta, b.T @ left), ("B", delta @ a.T, left @ a.T)):
            expected = float(rest.norm() / whole.norm())
            assert float(ratios[f"{name}.lora_{factor}.default.weight"]) == pytest.approx(expected, abs=1e-4)


def layer_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    a, b = (getattr(layer, factor)["default"].weight.detach().double().clone() for factor in ("lora_A", "lora_B"))
    return a, b, layer.scaling["default"]


def test_adapters_resume_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, FusedDriftAdamW]:
        model = adapted_model()
        return model, FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas()), lr=1e-2, anchor=True)

    model, optimizer = start()
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    expected = train(model, optimizer, 4, 7)
    model, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for name, found in train(model, optimizer, 4, 7).items():
        assert torch.equal(found, expected[name]), name


def test_what_cannot_be_followed_is_refused() -> None:
    model = adapted_model(use_dora=True)
    with pytest.raises(ValueError, match=r"cannot follow .*: DoRA's magnitudes move it"):
        FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas()), anchor=True)
    with pytest.raises(ValueError, match="prior_device must be None"):
        FusedDriftAdamW(make_model().named_parameters(), prior=make_prior(), anchor=True, prior_device="cpu")
    model = adapted_model(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="refresh must be 1, got 2"):
        FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas(), refresh=2), anchor=True)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="several adapters move it"):
        FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas()), anchor=True)
    loss_of(model, 0)
    with pytest.raises(PriorError):
        FusedDriftAdamW(make_model().parameters(), prior=make_prior(), anchor=True)
