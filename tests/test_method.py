"""A step with a prior compared with the method's formulas in float64; at alpha 0; and at extreme norms and cosines."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from biasing import (
    BACKENDS,
    DEVICE,
    FREE,
    SHAPES,
    assert_close,
    assert_same,
    copies,
    make_deltas,
    make_params,
    random_grads,
)
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW
from drift_kernels.engine.figures import bias_figures
from drift_kernels.kernels.scalings import SCALINGS


def bias(grad: Tensor, delta: Tensor, weight_norm: Tensor, alpha: float, scaling: str) -> Tensor:
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
@pytest.mark.parametrize(("max_grad_norm", "maximize"), [(None, False), (0.5, False), (1e6, False), (0.5, True)])
def test_with_a_prior_it_is_the_method_in_float64(
    backend: str, scaling: str, max_grad_norm: float | None, maximize: bool
) -> None:
    """Bias each gradient of the descent direction, clip with clip_grad_norm_, then torch.optim.AdamW; decoupled: AdamW,
    then lr*alpha*delta."""
    params, deltas = make_params(), make_deltas()
    expected = {name: nn.Parameter(p.detach().double()) for name, p in params.items()}
    start_norms = {name: p.detach().norm() for name, p in expected.items()}
    # If a bias almost cancels a gradient, g'/(|g'| + eps) amplifies float32's rounding of g' by up to 1/eps. With
    # eps = lr, a parameter errs no more than g' does: by a few times 2^-24 of the terms of g' (below 6).
    lr, alpha, eps = 1e-2, 0.7, 1e-2
    ours = FusedDriftAdamW(
        params.items(),
        lr=lr,
        eps=eps,
        prior=deltas,
        alpha=alpha,
        prior_scaling="absolute" if scaling == "normalized" else scaling,
        normalize_to_param=scaling == "normalized",
        max_grad_norm=max_grad_norm,
        maximize=maximize,
        backend=backend,
    )
    theirs = torch.optim.AdamW(expected.values(), lr=lr, eps=eps)
    for _ in range(5):
        for name, grad in random_grads(params).items():
            descent = -grad.double() if maximize else grad.double()
            if name != FREE and scaling != "decoupled" and grad.numel():
                descent = bias(descent, deltas[name].double(), start_norms[name], alpha, scaling)
            expected[name].grad = descent
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


def test_figures_of_several_batches() -> None:
    """A parameter that is given twice has a batch for its second step, without a delta here. (One with a delta is on
    another device: a stand-in. Figures that only one of both has would not be in the order of the names.)"""
    p, q = (nn.Parameter(torch.randn(5, device=DEVICE)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = FusedDriftAdamW([("p", p), ("p", p), ("q", q)], prior={"q": torch.randn(5)})
    for param in (p, q):
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.prior_names == ["q"]
    assert optimizer.prior_cosine is not None
    assert optimizer.prior_cosine.shape == (1,)

    of_q = next(batch for batch in optimizer._engine.batches if batch.biased)
    without = SimpleNamespace(prior_cosine=None, prior_ratio=None)
    stand_in: Any = SimpleNamespace(slots=of_q.slots, biased=of_q.biased, coefficients=without)
    figures = bias_figures([of_q, stand_in])
    assert (figures.names, figures.cosine, figures.ratio) == (["q", "q"], None, None)


def test_positive_alpha_pulls_toward_the_expert() -> None:
    for scaling in SCALINGS:
        param = nn.Parameter(torch.zeros(1000, device=DEVICE))
        expert = torch.randn(1000, device=DEVICE)
        optimizer = FusedDriftAdamW([("w", param)], lr=1e-2, prior={"w": expert}, prior_scaling=scaling)
        for _ in range(10):
            param.grad = torch.randn_like(param) * 1e-3
            optimizer.step()
        assert torch.dot(param.detach(), expert) > 0, scaling


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_at_alpha_zero_no_delta_is_read(scaling: str, max_grad_norm: float | None, backend: str) -> None:
    """Bitwise plain AdamW, although the deltas have become NaN; and NaN as soon as they are read."""
    params, deltas = make_params(), make_deltas()
    plain = copies(params)
    common = {"max_grad_norm": max_grad_norm, "backend": backend}
    ours = FusedDriftAdamW(params.items(), prior=deltas, alpha=0.0, prior_scaling=scaling, **common)
    theirs = FusedDriftAdamW(plain.values(), **common)
    for _ in range(2):
        random_grads(params, plain)
        ours.step()
        theirs.step()
        assert ours.biased_names == []
        assert (ours.prior_cosine is None) == (max_grad_norm is None), "statistics that this step did not need"
        for delta in deltas.values():
            delta.fill_(math.nan)
    assert_same(params, plain)
    ours.param_groups[0]["alpha"] = 1.0
    ours.step()
    assert all(params[name].isnan().all() for name in SHAPES)


# Extreme norms and cosines


@pytest.mark.parametrize("scaling", ["gradnorm", "adaptive_cosine"])
def test_a_zero_gradient_takes_no_bias(scaling: str) -> None:
    param = nn.Parameter(torch.randn(100, device=DEVICE))
    before = param.detach().clone()
    optimizer = FusedDriftAdamW([("w", param)], prior={"w": torch.randn(100)}, prior_scaling=scaling, weight_decay=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state[param]["exp_avg"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_along_its_delta_is_taken_away_whole(backend: str) -> None:
    """24 pairs: in half of them, rounding takes the cosine above 1; likewise the square of the norm below 0."""
    for _ in range(24):
        param, delta = nn.Parameter(torch.zeros(100, device=DEVICE)), torch.randn(100, device=DEVICE)
        optimizer = FusedDriftAdamW(
            [("w", param)], prior={"w": delta}, prior_scaling="adaptive_cosine", max_grad_norm=1.0, backend=backend
        )
        param.grad = 4 * delta
        optimizer.step()
        assert optimizer.prior_cosine is not None
        assert 1 - 1e-6 <= float(optimizer.prior_cosine) <= 1
        assert optimizer.grad_norm is not None
        assert float(optimizer.grad_norm) <= 1e-3 * float(param.grad.norm())
        assert param.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_norm_is_clipped_as_torch_clips_it(backend: str) -> None:
    """A norm for which the added 1e-6 is a third of the sum: to 1e-5, measured by exp_avg, which is proportional."""
    params = make_params()
    others = copies(params)
    ours = FusedDriftAdamW(params.values(), max_grad_norm=1e-6, backend=backend)
    theirs = torch.optim.AdamW(others.values())
    random_grads(params, others)
    norm = nn.utils.get_total_norm([p.grad for p in params.values()])
    for p in (*params.values(), *others.values()):
        p.grad *= 2e-6 / norm
    nn.utils.clip_grad_norm_(others.values(), 1e-6)
    ours.step()
    theirs.step()
    for name, p in params.items():
        exp_avg = theirs.state[others[name]]["exp_avg"]
        torch.testing.assert_close(ours.state[p]["exp_avg"], exp_avg, rtol=1e-5, atol=0)


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
