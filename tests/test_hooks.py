"""The prior for any optimizer as hooks: attach_prior; and the input that it and GradientBias reject."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from biasing import (
    DEVICE,
    SCALINGS,
    assert_same,
    backward,
    grads,
    two_models,
    watched_loads,
)
from torch import Tensor

from drift_kernels import (
    BackendUnavailableError,
    FusedDriftAdamW,
    GradientBias,
    PriorMismatchError,
    attach_prior,
)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_hooks_do_what_the_fused_form_does(scaling: str) -> None:
    """Bitwise, with tied weights, whose complete gradient is biased once."""
    hooked, plain, deltas = two_models()
    handle = attach_prior(hooked, deltas, alpha=0.5, prior_scaling=scaling)
    bias = GradientBias(plain.named_parameters(), deltas, alpha=0.5, prior_scaling=scaling)
    assert handle.prior.fingerprint == bias.prior.fingerprint
    for alpha in (0.5, 0.1, 0.0):
        handle.alpha = bias.alpha = alpha
        backward(hooked, plain)
        assert bool(bias.apply_().names) == (alpha != 0)
        assert_same(grads(hooked), grads(plain))
        hooked.zero_grad()
        plain.zero_grad()


def test_hooks_load_deltas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, deltas = two_models()
    loaded = watched_loads(monkeypatch)
    handle = attach_prior(model, deltas)
    for _ in range(3):
        backward(model)
    assert sorted(loaded[handle.prior]) == sorted(deltas)


def test_hooks_under_accumulation() -> None:
    """Active in each micro-batch, or paused in all but the last; a pause within a pause does not end it."""
    each, paused, deltas = two_models()
    plain = copy.deepcopy(each)
    attach_prior(each, deltas, alpha=0.5, prior_scaling="gradnorm")
    handle = attach_prior(paused, deltas, alpha=0.5, prior_scaling="gradnorm")
    bias = GradientBias(plain.named_parameters(), deltas, alpha=0.5, prior_scaling="gradnorm")
    step_by_step = copy.deepcopy(plain)
    bias_each = GradientBias(step_by_step.named_parameters(), deltas, alpha=0.5, prior_scaling="gradnorm")
    for micro_batch in range(3):
        if micro_batch < 2:
            with handle.paused():
                with handle.paused():
                    pass
                state = torch.get_rng_state()
                backward(paused)
                torch.set_rng_state(state)
        else:
            state = torch.get_rng_state()
            backward(paused)
            torch.set_rng_state(state)
        backward(each, plain, step_by_step)
        bias_each.apply_()
    bias.apply_()
    assert_same(grads(paused), grads(plain))
    assert_same(grads(each), grads(step_by_step))
    assert not torch.equal(each.inner.weight.grad, plain.inner.weight.grad)


def test_an_exception_ends_a_pause() -> None:
    model, plain, deltas = two_models()
    handle = attach_prior(model, deltas)
    with pytest.raises(KeyError), handle.paused():
        raise KeyError
    backward(model, plain)
    assert not torch.equal(model.inner.weight.grad, plain.inner.weight.grad)


def test_hooks_are_removed() -> None:
    model, plain, deltas = two_models()
    handle = attach_prior(model, deltas)
    handle.remove()
    handle.remove()
    backward(model, plain)
    assert_same(grads(model), grads(plain))


def test_a_hook_that_comes_later_sees_the_biased_gradient() -> None:
    """An optimizer that steps in the backward pass, and frees the gradient."""
    model, plain, deltas = two_models()
    attach_prior(model, deltas, prior_scaling="absolute")
    seen: dict[str, Tensor] = {}

    def take(name: str, p: Tensor) -> None:
        seen[name] = p.grad
        p.grad = None

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
    backward(model, plain)
    for name, p in plain.named_parameters():
        assert torch.equal(seen[name], p.grad - deltas.get(name, torch.zeros_like(p)))


def test_a_hook_that_came_earlier_may_take_the_gradient() -> None:
    model, _, deltas = two_models()
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    handle = attach_prior(model, deltas)
    backward(model)
    assert all(param.grad is None for param in model.parameters())
    assert not handle.has_acted


def test_frozen_parameters_get_no_hook() -> None:
    model, plain, deltas = two_models()
    for frozen in (model.embed_tokens.weight, plain.embed_tokens.weight):
        frozen.requires_grad_(False)
    attach_prior(model, deltas, prior_scaling="absolute")
    backward(model, plain)
    assert torch.equal(model.inner.weight.grad, plain.inner.weight.grad - deltas["inner.weight"])
    model.requires_grad_(False)
    with pytest.raises(PriorMismatchError, match="parameters that it covers are frozen"):
        attach_prior(model, deltas)


def test_torch_adamw_under_hooks() -> None:
    """Like FusedDriftAdamW, within the bound of the fused form, over 10 steps with feedback."""
    hooked, fused, deltas = two_models()
    attach_prior(hooked, deltas, alpha=0.1, prior_scaling="absolute")
    theirs = torch.optim.AdamW(hooked.parameters(), lr=1e-3)
    ours = FusedDriftAdamW(fused.named_parameters(), lr=1e-3, prior=deltas, alpha=0.1, prior_scaling="absolute")
    for _ in range(10):
        backward(hooked, fused)
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(hooked.parameters(), fused.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * p.abs().max().clamp(min=1.0)


# Wrong inputs of both forms


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"prior_scaling": "cosine"},
            ValueError,
            "prior_scaling must be one of absolute, gradnorm, adaptive_cosine, got 'cosine'",
        ),
        ({"prior_scaling": "decoupled"}, ValueError, "got 'decoupled' .it moves parameters, not gradients"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got alpha=nan"),
        ({"alpha": "much"}, TypeError, "alpha must be a number"),
        ({"backend": "mkl"}, ValueError, "backend must be 'auto' or one of"),
        ({"prior_device": "cuda"}, ValueError, "prior_device must be 'cpu'"),
        ({"prior": 3}, TypeError, "prior must be a Prior, a path, or a mapping"),
        ({"prior": {"other.weight": torch.ones(3)}}, PriorMismatchError, "no parameter matches"),
        ({"prior": {"inner.weight": torch.ones(3)}}, PriorMismatchError, "inner.weight"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """Both forms reject them, and leave no hook behind."""
    model, plain, deltas = two_models()
    given = {"prior": deltas, **options}
    prior = given.pop("prior")
    with pytest.raises(error, match=words):
        GradientBias(model.named_parameters(), prior, **given)
    with pytest.raises(error, match=words):
        attach_prior(model, prior, **given)
    backward(model, plain)
    assert_same(grads(model), grads(plain))


def test_a_backend_that_cannot_run_here() -> None:
    model, _, deltas = two_models()
    name = "cpu" if DEVICE.type == "cuda" else "cuda"
    for make in (lambda: GradientBias(model.named_parameters(), deltas, backend=name),
                 lambda: attach_prior(model, deltas, backend=name)):  # fmt: skip
        with pytest.raises(BackendUnavailableError):
            make()
