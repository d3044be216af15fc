"""AlphaScheduler against the formula alpha = initial_alpha * factor(step)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drift_kernels import AlphaScheduler, FusedDriftAdamW, linear_anneal


def optimizer(alpha: float = 2.0) -> FusedDriftAdamW:
    weights = {name: nn.Parameter(torch.randn(3)) for name in ("a", "b")}
    groups = [{"params": [("a", weights["a"])]}, {"params": [("b", weights["b"])], "alpha": 4.0}]
    return FusedDriftAdamW(groups, prior={"a": torch.ones(3), "b": torch.ones(3)}, alpha=alpha)


def test_a_linear_anneal_and_one_function_per_group() -> None:
    schedule = AlphaScheduler(optimizer(), [linear_anneal(4), lambda step: 0.5**step])
    seen = []
    for _ in range(6):
        seen.append(schedule.get_last_alpha())
        schedule.step()
    assert seen == [[2.0, 4.0], [1.5, 2.0], [1.0, 1.0], [0.5, 0.5], [0.0, 0.25], [0.0, 0.125]]


def test_it_resumes_from_its_state_dict_and_from_the_optimizers() -> None:
    first = optimizer()
    schedule = AlphaScheduler(first, linear_anneal(10))
    for _ in range(3):
        schedule.step()
    second = optimizer(7.0)
    resumed = AlphaScheduler(second, linear_anneal(10))
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_alpha() == schedule.get_last_alpha() == pytest.approx([1.4, 2.8])

    third = optimizer()
    third.load_state_dict(first.state_dict())
    again = AlphaScheduler(third, linear_anneal(10), last_epoch=2)
    assert again.get_last_alpha() == schedule.get_last_alpha()
    for s in (schedule, resumed, again):
        s.step()
    assert schedule.get_last_alpha() == resumed.get_last_alpha() == again.get_last_alpha()
    assert AlphaScheduler(first, linear_anneal(10)).get_last_alpha() == [2.0, 4.0], "it begins afresh"


def test_the_optimizer_takes_the_alpha_of_the_moment() -> None:
    """Annealed to zero, the prior has no effect: the same as an optimizer without one, from the same state."""
    annealed = optimizer()
    schedule = AlphaScheduler(annealed, linear_anneal(1))
    schedule.step()
    params = [p for group in annealed.param_groups for p in group["params"]]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    plain = FusedDriftAdamW(copies)
    for p, q in zip(params, copies, strict=True):
        p.grad = torch.randn(3)
        q.grad = p.grad.clone()
    annealed.step()
    plain.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
