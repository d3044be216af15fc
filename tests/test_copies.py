"""Used priors, optimizers and GradientBias: their copies, deep or pickled, continue like the originals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from biasing import (
    BF16,
    DEVICE,
    F32,
    SCALINGS,
    Params,
    assert_same,
    copies,
    grads_of,
    make_deltas,
    make_params,
    random_grads,
)
from checkpoints import write_checkpoint

from drift_kernels import AlphaScheduler, FusedDriftAdamW, GradientBias, Prior, bias_gradients_, build_prior
from drift_kernels.prior import quantize

Copy = Callable[[Any], Any]

KINDS = ("opened", "mapping", "quantised")
COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deep", "pickle"]
)
MODES = {
    "float32": (F32, {}),
    "float32, clipped": (F32, {"max_grad_norm": 0.5, "prior_scaling": "gradnorm"}),
    "absolute, of the parameter's norm": (F32, {"prior_scaling": "absolute", "normalize_to_param": True}),
    "bfloat16 states": (BF16, {"rounding": "stochastic", "seed": 3, "state_dtype": BF16}),
    "codes": (BF16, {"rounding": "stochastic", "seed": 3, "state_dtype": "int8"}),
    "masters": (BF16, {"master_weights": True}),
    "masters, codes": (BF16, {"master_weights": True, "state_dtype": "int8"}),
}


@pytest.fixture(params=KINDS)
def prior(request: pytest.FixtureRequest, tmp_path: Path) -> Prior:
    """Every kind of prior, for `large_params`."""
    deltas = large_deltas()
    if request.param == "mapping":
        return Prior.from_mapping(deltas)
    if request.param == "quantised":
        return Prior.from_mapping({name: quantize(delta, torch.int8) for name, delta in deltas.items()})
    base = {name: torch.randn(delta.shape) for name, delta in deltas.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", {name: w + deltas[name].cpu() for name, w in base.items()})
    return build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=("re:.",))


def large_deltas() -> dict[str, torch.Tensor]:
    """Deltas, one of them large enough for states stored as codes, none empty."""
    deltas = {name: delta for name, delta in make_deltas().items() if delta.numel()}
    return {**deltas, "layers.1.weight": 0.1 * torch.randn(33, 128, device=DEVICE)}


def large_params(dtype: torch.dtype = F32) -> Params:
    large = torch.nn.Parameter(torch.randn(33, 128, device=DEVICE).to(dtype))
    return {**make_params(dtype), "layers.1.weight": large}


def tensors_of(params: Params, optimizer: FusedDriftAdamW) -> dict[str, torch.Tensor]:
    states = {f"{n} {key}": t.clone() for n, p in params.items() for key, t in optimizer.state[p].items()}
    return {**{name: p.detach().clone() for name, p in params.items()}, **states}


# Priors


def assert_same_prior(one: Prior, other: Prior) -> None:
    assert (other.names, other.fingerprint, other.record) == (one.names, one.fingerprint, one.record)
    for name in one.names:
        assert other.info(name) == one.info(name)
        assert torch.equal(other.load(name), one.load(name))


@COPIES
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_of_a_prior_is_that_prior(prior: Prior, used: bool, copied: Copy) -> None:
    """Even after `bias_gradients_` has cached its preparations in it."""
    params = large_params(BF16)
    if used:
        random_grads(params)
        assert bias_gradients_(params.items(), prior).names
    other = copied(prior)
    assert other is not prior
    assert_same_prior(prior, other)
    others = copies(params)
    for scaling in SCALINGS:
        random_grads(params, others)
        bias_gradients_(params.items(), prior, 0.3, scaling)
        bias_gradients_(others.items(), other, 0.3, scaling)
        assert_same(grads_of(others), grads_of(params))


@COPIES
def test_a_copy_of_a_used_prior_holds_no_parameters(copied: Copy) -> None:
    """It biases the parameters passed to it, not copies of those that the original was used with."""
    params = large_params()
    prior = Prior.from_mapping(large_deltas())
    random_grads(params)
    bias_gradients_(params.items(), prior)
    other = copied(prior)
    random_grads(params)
    expected = copies(params)
    for name, p in params.items():
        expected[name].grad = p.grad.clone()
    bias_gradients_(params.items(), other)
    bias_gradients_(expected.items(), prior)
    assert_same(grads_of(params), grads_of(expected))


def test_a_used_prior_takes_no_more_room_in_a_file() -> None:
    """What is cached for its parameters is not saved."""
    params = large_params()
    prior = Prior.from_mapping(large_deltas())
    fresh = len(pickle.dumps(prior))
    random_grads(params)
    bias_gradients_(params.items(), prior)
    assert len(pickle.dumps(prior)) < 1.1 * fresh


# Optimizers


@COPIES
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_of_a_used_optimizer_goes_on_as_the_original(prior: Prior, mode: str, copied: Copy) -> None:
    """Copied together with its parameters; neither changes the other."""
    dtype, options = MODES[mode]
    params = large_params(dtype)
    groups = [
        {"params": [(name, p) for name, p in params.items() if p.dim() > 1], "alpha": 0.3},
        {"params": [(name, p) for name, p in params.items() if p.dim() == 1], "weight_decay": 0.0, "alpha": 0.1},
    ]
    optimizer = FusedDriftAdamW(groups, lr=1e-2, prior=prior, **options)
    for _ in range(2):
        random_grads(params)
        optimizer.step()
    other_params, other = copied((params, optimizer))
    assert [id(p) for group in other.param_groups for p in group["params"]] != [
        id(p) for group in optimizer.param_groups for p in group["params"]
    ]
    assert_same(tensors_of(other_params, other), tensors_of(params, optimizer))
    assert_same_prior(optimizer.prior, other.prior)
    for _ in range(2):
        before = tensors_of(params, optimizer)
        random_grads(params, other_params)
        other.step()
        assert_same(tensors_of(params, optimizer), before)
        optimizer.step()
        assert_same(tensors_of(other_params, other), tensors_of(params, optimizer))
        assert torch.equal(other.prior_cosine, optimizer.prior_cosine) if optimizer.prior_cosine is not None else True


@COPIES
def test_a_copy_of_an_optimizer_without_a_prior_goes_on_as_the_original(copied: Copy) -> None:
    params = large_params()
    optimizer = FusedDriftAdamW(params.values(), lr=1e-2, max_grad_norm=1.0)
    random_grads(params)
    optimizer.step()
    other_params, other = copied((params, optimizer))
    random_grads(params, other_params)
    optimizer.step()
    other.step()
    assert_same(tensors_of(other_params, other), tensors_of(params, optimizer))
    assert torch.equal(other.grad_norm, optimizer.grad_norm)


# GradientBias


@COPIES
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    "options",
    [*({"prior_scaling": s} for s in SCALINGS), {"prior_scaling": "absolute", "normalize_to_param": True}],
    ids=str,
)
def test_a_copy_of_a_gradient_bias_goes_on_as_the_original(
    prior: Prior, options: dict[str, Any], used: bool, copied: Copy
) -> None:
    """Copied together with its parameters, which change in between: it biases only the gradients of the copies."""
    params = large_params(BF16)
    bias = GradientBias(params.items(), prior, alpha=0.7, **options)
    if used:
        random_grads(params)
        bias.apply_()
        with torch.no_grad():
            for p in params.values():
                p.mul_(1.5)
    other_params, other = copied((params, bias))
    assert_same_prior(bias.prior, other.prior)
    for alpha in (0.7, -0.2):
        bias.alpha = other.alpha = alpha
        random_grads(params, other_params)
        before = grads_of(params)
        theirs = other.apply_()
        assert_same(grads_of(params), before)
        ours = bias.apply_()
        assert_same(grads_of(other_params), grads_of(params))
        assert theirs.names == ours.names
        for found, expected in zip(theirs[1:], ours[1:], strict=True):
            assert expected is found is None or torch.equal(found, expected)


def test_a_copy_of_a_scheduled_gradient_bias_has_its_own_schedule() -> None:
    params = large_params()
    bias = GradientBias(params.items(), large_deltas(), alpha=0.5, prior_scaling="absolute")
    schedule = AlphaScheduler(bias, lambda step: 0.5**step)
    random_grads(params)
    bias.apply_()
    _, other, other_schedule = copy.deepcopy((params, bias, schedule))
    other_schedule.step()
    assert (bias.alpha, other.alpha) == (0.5, 0.25)
