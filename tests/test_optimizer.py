"""FusedDriftAdamW compared with torch.optim.AdamW, and with the method's formulas in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

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


def assert_close(params: dict[str, nn.Parameter], expected: dict[str, nn.Parameter], relative: float) -> None:
    """Check that every element is within `relative` of the tensor's largest, or of 1: all start as normal numbers, and
    some may end near zero."""
    for name in params:
        a, e = params[name].detach().double(), expected[name].detach().double()
        bound = relative * max(1.0, float(e.abs().max())) if e.numel() else 0.0
        assert (a - e).abs().le(bound).all(), f"{name}: off by {(a - e).abs().max():.3g}, bound {bound:.3g}"


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
    params = make_params(torch.bfloat16)
    expected = copies(params)
    ours = FusedDriftAdamW(params.values(), lr=1e-2, state_dtype=torch.bfloat16, backend=backend)
    theirs = torch.optim.AdamW(expected.values(), lr=1e-2, fused=True)
    for _ in range(10):
        random_grads(params, expected)
        ours.step()
        theirs.step()
        for p, e in zip(params.values(), expected.values(), strict=True):
            assert (p.detach().view(torch.int16).int() - e.detach().view(torch.int16).int()).abs().le(1).all()
            with torch.no_grad():
                e.copy_(p)
                for key in ("exp_avg", "exp_avg_sq"):
                    theirs.state[e][key].copy_(ours.state[p][key])


def bias(name: str, grad: Tensor, delta: Tensor, weight_norm: Tensor, alpha: float, scaling: str) -> Tensor:
    """The authors' formulas, in the dtype of `grad`."""
    norm, delta_norm = grad.norm(), delta.norm()
    if scaling == "absolute":
        return grad - alpha * delta
    if scaling == "normalized":
        return grad - alpha * delta * weight_norm / delta_norm
    if scaling == "adaptive_cosine":
        alpha = alpha * ((grad * delta).sum() / (norm * delta_norm)).clamp(-1, 1).add(1).div(2)
    return grad - alpha * norm * delta / delta_norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", ["absolute", "normalized", "gradnorm", "adaptive_cosine", "decoupled"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_with_a_prior_it_is_the_method_in_float64(backend: str, scaling: str, max_grad_norm: float | None) -> None:
    """Bias each gradient, clip with clip_grad_norm_, then torch.optim.AdamW; decoupled: AdamW, then lr*alpha*delta."""
    params = make_params()
    expected = copies(params, torch.float64)
    deltas = {name: torch.randn_like(p) * 0.1 for name, p in params.items() if not name.startswith("norm")}
    start_norms = {name: p.detach().norm() for name, p in expected.items()}
    # If a bias almost cancels a gradient, g'/(|g'| + eps) with a small eps would amplify float32's rounding of g'.
    lr, alpha, eps = 1e-2, 0.7, 1e-3
    ours = FusedDriftAdamW(
        params.items(),
        lr=lr,
        eps=eps,
        prior=deltas,
        alpha=alpha,
        prior_scaling="absolute" if scaling == "normalized" else scaling,
        normalize_to_param=scaling == "normalized",
        max_grad_norm=max_grad_norm,
        backend=backend,
    )
    theirs = torch.optim.AdamW(expected.values(), lr=lr, eps=eps)
    for _ in range(5):
        random_grads(params, expected)
        for name, delta in deltas.items():
            grad = expected[name].grad
            assert grad is not None
            if scaling != "decoupled" and delta.numel():
                expected[name].grad = bias(name, grad, delta.double(), start_norms[name], alpha, scaling)
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(expected.values(), max_grad_norm)
        ours.step()
        theirs.step()
        if scaling == "decoupled":
            with torch.no_grad():
                for name, delta in deltas.items():
                    expected[name] += lr * alpha * delta.double()
        if max_grad_norm is not None:
            assert ours.grad_norm is not None
            torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
    assert_close(params, expected, 2e-6)


def test_logged_cosine_and_ratio() -> None:
    params = make_params()
    deltas = {"layers.0.weight": torch.randn(33, 65, device=DEVICE), "layers.0.bias": torch.randn(33, device=DEVICE)}
    ours = FusedDriftAdamW(params.items(), prior=deltas, alpha=0.3, prior_scaling="gradnorm")
    random_grads(params)
    cosines = {
        name: nn.functional.cosine_similarity(params[name].grad.flatten(), delta.flatten(), dim=0)
        for name, delta in deltas.items()
    }
    assert ours.prior_cosine is None
    ours.step()
    assert sorted(ours.prior_names) == sorted(deltas)
    assert ours.prior_cosine is not None
    assert ours.prior_ratio is not None
    for name, cosine, ratio in zip(ours.prior_names, ours.prior_cosine, ours.prior_ratio, strict=True):
        assert float(cosine) == pytest.approx(float(cosines[name]), abs=1e-6)
        assert float(ratio) == pytest.approx(0.3, rel=1e-6)
    assert ours.grad_norm is None, "the norm of all gradients takes a pass that this step did not need"


def test_groups_keep_their_own_hyperparameters_and_tensors_their_own_steps() -> None:
    """Groups that differ in everything, gradients that come and go, schedules: like one optimizer per tensor."""
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


def test_alpha_zero_is_plain_adamw() -> None:
    params = make_params()
    plain = copies(params)
    deltas = {name: torch.randn_like(p) for name, p in params.items()}
    ours = FusedDriftAdamW(params.items(), prior=deltas, alpha=0.0)
    theirs = FusedDriftAdamW(plain.values())
    for _ in range(3):
        random_grads(params, plain)
        ours.step()
        theirs.step()
    for name in params:
        assert torch.equal(params[name], plain[name])


@pytest.mark.parametrize("scaling", ["gradnorm", "adaptive_cosine"])
def test_a_zero_gradient_takes_no_bias(scaling: str) -> None:
    param = nn.Parameter(torch.randn(100, device=DEVICE))
    before = param.detach().clone()
    optimizer = FusedDriftAdamW([("w", param)], prior={"w": torch.randn(100)}, prior_scaling=scaling, weight_decay=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state[param]["exp_avg"].any()


def test_positive_alpha_pulls_toward_the_expert() -> None:
    for scaling in ("absolute", "gradnorm", "adaptive_cosine", "decoupled"):
        param = nn.Parameter(torch.zeros(1000, device=DEVICE))
        expert = torch.randn(1000, device=DEVICE)
        optimizer = FusedDriftAdamW([("w", param)], lr=1e-2, prior={"w": expert}, prior_scaling=scaling)
        for _ in range(10):
            param.grad = torch.randn_like(param) * 1e-3
            optimizer.step()
        assert torch.dot(param.detach(), expert) > 0, scaling


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("scaling", ["absolute", "adaptive_cosine"])
def test_a_poisoned_gradient_stays_where_torch_has_it(poison: float, scaling: str) -> None:
    params = make_params()
    theirs = copies(params)
    optimizer = FusedDriftAdamW(
        params.items(), prior={"layers.0.weight": torch.randn(33, 65)}, prior_scaling=scaling, alpha=0.1
    )
    adamw = torch.optim.AdamW(theirs.values())
    random_grads(params, theirs)
    for model in (params, theirs):
        grad = model["layers.0.weight"].grad
        assert grad is not None
        grad[3, 4] = poison
    optimizer.step()
    adamw.step()
    for name in params:
        assert torch.equal(params[name].isfinite(), theirs[name].isfinite())


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
