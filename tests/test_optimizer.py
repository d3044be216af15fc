"""FusedDriftAdamW compared with torch.optim.AdamW, and changes to it between steps."""

from __future__ import annotations

import copy

import pytest
import torch
from biasing import assert_close
from torch import nn

from drift_kernels import FusedDriftAdamW
from drift_kernels.kernels import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in backends.NAMES if backends.load(name).unavailable(DEVICE) is None]
SHAPES = {
    "layers.0.weight": (33, 65),
    "layers.0.bias": (33,),
    "norm.weight": (7,),
    "embed.weight": (1, 1),
    "empty": (0, 4),
}


def make_params(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for name, shape in SHAPES.items()}


def copies(params: dict[str, nn.Parameter], dtype: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for name, p in params.items()}


def random_grads(*models: dict[str, nn.Parameter], scale: float = 1.0) -> None:
    """Give every model the same fresh gradients."""
    for name in models[0]:
        grad = (torch.randn(models[0][name].shape, device=DEVICE) * scale).to(models[0][name].dtype)
        for params in models:
            params[name].grad = grad.to(params[name].dtype, copy=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_prior_it_is_torch_adamw(backend: str, maximize: bool) -> None:
    params = make_params()
    expected = copies(params)
    options = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.05, "maximize": maximize}
    ours = FusedDriftAdamW(params.values(), **options, backend=backend)
    theirs = torch.optim.AdamW(expected.values(), **options)
    for _ in range(20):
        random_grads(params, expected)
        ours.step()
        theirs.step()
    assert_close(params, expected, 2e-6)
    for p, e in zip(params.values(), expected.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            a, b = ours.state[p][key].cpu(), theirs.state[e][key].cpu()
            atol = 2e-6 * max(1.0, float(b.abs().max())) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_within_an_ulp_of_torch_a_step(backend: str) -> None:
    """Both compute in float32 in another order and round once. What the order changes, a few float32 roundings of the
    parameter and of lr, is added to the ulp: where they cancel, it is more than the result's own ulp."""
    lr = 1e-2
    params = make_params(torch.bfloat16)
    expected = copies(params)
    ours = FusedDriftAdamW(params.values(), lr=lr, state_dtype=torch.bfloat16, backend=backend)
    theirs = torch.optim.AdamW(expected.values(), lr=lr, fused=True)
    for _ in range(10):
        random_grads(params, expected)
        before = copies(params)
        ours.step()
        theirs.step()
        for name, p in params.items():
            found, wanted = p.detach().double(), expected[name].detach().double()
            exponent = torch.frexp(torch.maximum(found.abs(), wanted.abs())).exponent
            ulp = torch.ldexp(torch.ones_like(found), exponent - 8)
            bound = ulp + 2**-21 * (before[name].detach().double().abs() + lr)
            assert (found - wanted).abs().le(bound).all(), name
        for p, e in zip(params.values(), expected.values(), strict=True):
            with torch.no_grad():
                e.copy_(p)
                for key in ("exp_avg", "exp_avg_sq"):
                    theirs.state[e][key].copy_(ours.state[p][key])


def test_groups_keep_their_own_hyperparameters_and_tensors_their_own_steps() -> None:
    """Groups that differ in everything, gradients that come and go, schedules, betas that change in one of two groups:
    like one optimizer per tensor."""
    params = make_params()
    deltas = {name: torch.randn_like(p) * 0.1 for name, p in params.items() if p.numel() > 1}
    separate = copies(params)
    options = [
        {"lr": 1e-2, "alpha": 0.5, "prior_scaling": "gradnorm"},
        {"lr": 1e-3, "weight_decay": 0.3, "alpha": 2.0, "prior_scaling": "decoupled"},
        {"betas": (0.5, 0.9), "eps": 1e-3, "alpha": -1.0, "prior_scaling": "absolute", "maximize": True},
        {},
        {},
    ]
    groups = [{"params": [(n, p)], **o} for (n, p), o in zip(params.items(), options, strict=True)]
    ours = FusedDriftAdamW(groups, prior=deltas)
    alone = [
        FusedDriftAdamW([(n, p)], prior={n: deltas[n]} if n in deltas else None, **o)
        for (n, p), o in zip(separate.items(), options, strict=True)
    ]
    for step in range(6):
        random_grads(params, separate)
        for i, name in enumerate(params):
            if (step + i) % 3 == 0:
                params[name].grad = separate[name].grad = None
        for index, optimizer in enumerate(alone):
            ours.param_groups[index]["lr"] = optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step + index)
        ours.param_groups[0]["betas"] = alone[0].param_groups[0]["betas"] = (0.9, 0.999 if step < 3 else 0.9)
        ours.step()
        for optimizer in alone:
            optimizer.step()
    for name in params:
        assert torch.equal(params[name], separate[name]), name
    steps = {name: float(ours.state[p]["step"]) for name, p in params.items()}
    assert steps == dict.fromkeys(params, 4.0)


def test_max_grad_norm_may_be_set_between_steps() -> None:
    """Like other hyperparameters; None turns clipping off from then on."""
    params = make_params()
    others = copies(params)
    ours = FusedDriftAdamW(params.values(), lr=1e-2, max_grad_norm=1e-3)
    for max_grad_norm in (1e-3, 0.5, None, 1.0):
        theirs = FusedDriftAdamW(others.values(), lr=1e-2, max_grad_norm=max_grad_norm)
        theirs.load_state_dict(ours.state_dict())
        ours.max_grad_norm = max_grad_norm
        random_grads(params, others)
        ours.step()
        theirs.step()
        assert (ours.grad_norm is None) == (max_grad_norm is None)
        for name in params:
            assert torch.equal(params[name], others[name]), (name, max_grad_norm)


def test_schedulers_closures_and_tensor_learning_rates() -> None:
    params = make_params()
    theirs = copies(params)
    ours = FusedDriftAdamW(params.values(), lr=torch.tensor(1e-2))
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) for optimizer in (ours, adamw)]
    for _ in range(5):
        random_grads(params, theirs)
        assert ours.step(lambda: 42.0) == 42.0
        adamw.step()
        for schedule in schedules:
            schedule.step()
    assert_close(params, theirs, 2e-6)


def test_a_non_contiguous_gradient_is_read_right_and_not_kept() -> None:
    param = nn.Parameter(torch.randn(8, 5, device=DEVICE))
    other = nn.Parameter(param.detach().clone())
    grad = torch.randn(5, 8, device=DEVICE)
    param.grad, other.grad = grad.t(), grad.t().contiguous()
    optimizers = [FusedDriftAdamW([p]) for p in (param, other)]
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(param, other)
    assert not any(launch.plan.grads for launch in optimizers[0]._engine.batches[0].launches)


def test_state_moved_replaced_or_reset_by_the_user_is_followed() -> None:
    params = make_params()
    theirs = copies(params)
    ours, adamw = FusedDriftAdamW(params.values()), torch.optim.AdamW(theirs.values())

    def replace(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].clone()

    def move(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone()

    def restart(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["step"] = torch.tensor(0.0)

    def clear(optimizer: torch.optim.Optimizer) -> None:
        optimizer.state.clear()

    def move_params(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data = p.data.clone()

    for change in (replace, move, restart, clear, move_params):
        random_grads(params, theirs)
        ours.step()
        adamw.step()
        change(ours)
        change(adamw)
    random_grads(params, theirs)
    ours.step()
    adamw.step()
    assert_close(params, theirs, 2e-6)


def test_steps_are_deterministic_and_the_optimizer_can_be_copied() -> None:
    params = make_params()
    deltas = {name: torch.randn_like(p) for name, p in params.items()}
    ours = FusedDriftAdamW(params.items(), prior=deltas, max_grad_norm=1.0)
    random_grads(params)
    ours.step()
    duplicate = copy.deepcopy(ours)
    random_grads(params)
    for p, q in zip(ours.param_groups[0]["params"], duplicate.param_groups[0]["params"], strict=True):
        q.grad = p.grad.clone()
    ours.step()
    duplicate.step()
    for p, q in zip(ours.param_groups[0]["params"], duplicate.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
