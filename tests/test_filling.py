"""Coefficients that a kernel fills, against coefficients.py, bit for bit.

The kernel runs on the host (grid.py), in a backend that is as the cuda backend is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grid
import pytest
import torch
from filled import Pair, Params, deltas_of, fills, models, on_backend, random_between, random_groups
from problems import BF16, DEVICE, assert_same_bits
from torch import Tensor

from drift_kernels import GradientBias
from drift_kernels.engine.launches import DeviceBatch
from drift_kernels.kernels.filling import Filling
from drift_kernels.kernels.scalings import SCALINGS, Scaling
from drift_kernels.sharding import Reduction

pytestmark = pytest.mark.skipif(
    grid.unavailable(DEVICE) is not None, reason="the kernels run on the host, where there is a C++ compiler"
)
begin = grid.begin


@pytest.fixture(autouse=True)
def kernels_on_the_host() -> Iterator[None]:
    with on_backend():
        yield


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6, math.inf])
@pytest.mark.parametrize("scaling", [*SCALINGS, "any"])
def test_it_is_coefficients_py_bit_for_bit(
    scaling: str, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hyperparameters that change, alpha by pattern, gradients that are zero, infinite or not there; and a mode that is
    nothing but another line of scalings.py."""
    monkeypatch.setitem(SCALINGS, "any", Scaling(*(random_between(-1, 1) for _ in Scaling._fields)))
    pair = Pair(
        both := models(),
        random_groups,
        prior=deltas_of(both[0]),
        prior_scaling=scaling,
        max_grad_norm=max_grad_norm,
    )
    given = fills(monkeypatch)
    special = {2: 0.0, 4: math.inf, 5: math.nan}
    for step in range(7):

        def spoil(params: Params, step: int = step) -> None:
            if step in special:
                params["layers.1.weight"].grad[0, 3] = special[step]
                if special[step] == 0.0:
                    params["layers.1.weight"].grad.zero_()
            if step == 3:
                params["layers.1.bias"].grad = None

        if step == 1:
            for group, other in zip(*(o.param_groups for o in pair.optimizers), strict=True):
                group["lr"] = other["lr"] = random_between(0, 0.1)
                group["betas"] = other["betas"] = (random_between(0, 0.9), 0.99)
                group["alpha"] = other["alpha"] = random_between(-1, 1)
        pair.step(monkeypatch, spoil)
    assert len(given) == 7


def test_gradients_along_their_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines that rounding has taken beyond 1, and squares of norms that it has taken below 0: in a half of such pairs
    each, of which there are 24."""
    for _ in range(24):
        both = models({"w": (100,)})
        deltas = deltas_of(both[0])

        def along(params: Params, deltas: dict[str, Tensor] = deltas) -> None:
            params["w"].grad = 4 * deltas["w"]

        pair = Pair(both, lambda params: [{"params": list(params.items())}], prior=deltas, max_grad_norm=0.5)
        pair.step(monkeypatch, along)
        assert float(pair.optimizers[0].grad_norm) <= 1e-3 * float(both[0]["w"].grad.norm())


def test_alpha_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    alpha = {"re:weight": 0.7, "re:bias": -0.3}
    pair = Pair(both, lambda params: [{"params": list(params.items())}], prior=deltas_of(both[0]), alpha=alpha)
    for _ in range(3):
        pair.step(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_are_read_by_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    lr, alpha = (torch.tensor(value, dtype=dtype, device=DEVICE) for value in (0.01, 0.3))
    common = {"prior": deltas_of(both[0]), "lr": lr, "alpha": alpha, "capturable": True, "max_grad_norm": 0.7}
    pair = Pair(both, lambda params: [{"params": list(params.items())}], **common)
    for _ in range(3):
        pair.step(monkeypatch)
        lr.mul_(0.7)
        alpha.mul_(-0.9)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_under_a_grad_scaler(scaling: str, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are no power of two, in float32 and as numbers; steps that are not taken, the first among them."""
    both = models()
    pair = Pair(both, random_groups, prior=deltas_of(both[0]), prior_scaling=scaling, max_grad_norm=max_grad_norm)
    for skipped in (1.0, 0.0, 0.0, math.nan, 0.0):
        scale = random_between(1, 1000)
        for optimizer in pair.optimizers:
            optimizer.grad_scale = torch.tensor([scale], device=DEVICE)
            optimizer.found_inf = torch.tensor(skipped, device=DEVICE)
        pair.step(monkeypatch)
    counts = {float(state["step"]) for state in pair.optimizers[0].state.values()}
    assert counts == {3.0}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_several_plans_of_which_some_need_no_sums(max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not measured any more is zero: the scaling of one plan's group changes."""
    first, second = models()
    for params in (first, second):
        params["layers.1.weight"].data = params["layers.1.weight"].data.to(BF16)

    def groups(params: Params) -> list[dict[str, Any]]:
        named = list(params.items())
        return [{"params": named[:1]}, {"params": named[1:2]}, {"params": named[2:], "prior_scaling": "absolute"}]

    options = {"prior": deltas_of(first), "alpha": 0.4, "max_grad_norm": max_grad_norm}
    pair = Pair((first, second), groups, **options, prior_scaling="adaptive_cosine")
    for scaling in ("adaptive_cosine", "absolute", "decoupled", "gradnorm", "gradnorm"):
        for optimizer in pair.optimizers:
            optimizer.param_groups[1]["prior_scaling"] = scaling
        pair.step(monkeypatch)
        (batch,) = pair.optimizers[0]._engine.batches
        (rows,) = (launch.rows for launch in batch.launches if launch.group_rows[0][0] == 1)
        measured = max_grad_norm is not None or scaling in ("adaptive_cosine", "gradnorm")
        assert bool((batch.coefficients.stats[rows] != 0).any()) == measured


def test_both_ways_in_turn_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that goes over from one to the other at any step, while hyperparameters change back and forth."""
    both = models()
    pair = Pair(both, random_groups, prior=deltas_of(both[0]), max_grad_norm=0.5)
    original, turns = DeviceBatch.can_fill, [True, False, False, True, True, False, True]
    for step, turn in enumerate(turns):
        monkeypatch.setattr(DeviceBatch, "can_fill", lambda self, groups, turn=turn: turn and original(self, groups))
        for optimizer in pair.optimizers:
            for group in optimizer.param_groups:
                # What coefficients.py wrote in step 2 holds again in step 5; the kernel wrote something else between.
                group["betas"] = (0.8, 0.999) if step in (3, 4) else (0.9, 0.99)
        pair.step(monkeypatch)


def test_counts_on_the_host_have_a_copy_that_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the kernel counts too: until a user, or coefficients.py, writes other counts."""
    monkeypatch.setattr(Filling, "_is_elsewhere", staticmethod(lambda table: True))
    both = models()
    pair = Pair(both, random_groups, prior=deltas_of(both[0]))
    for step in range(6):
        if step == 3:
            for optimizer, params in zip(pair.optimizers, both, strict=True):
                optimizer.state[params["layers.1.bias"]]["step"].fill_(70_000)
        pair.step(monkeypatch)
        (batch,) = pair.optimizers[0]._engine.batches
        assert torch.equal(batch._filling._steps, batch.coefficients.steps)
        assert batch._filling._steps.data_ptr() != batch.coefficients.steps.data_ptr()


def test_all_reduced_between_the_first_launch_and_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a second rank had the same sums."""
    both = models()
    launches = []

    def sum_(self: Reduction, values: Tensor) -> None:
        launches.append(grid.launched().value)
        values.mul_(2)

    monkeypatch.setattr(Reduction, "sum_", sum_)
    pair = Pair(both, random_groups, prior=deltas_of(both[0]), max_grad_norm=0.5)
    for _ in range(3):
        before = grid.launched().value
        pair.step(monkeypatch)
        # Of two plans: sums of each, one launch for coefficients (or none), an update of each.
        assert launches == [before + 2, before + 5 + 2]
        launches.clear()


def test_the_bias_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    deltas, given = deltas_of(both[0]), fills(monkeypatch)
    for scaling in ("absolute", "gradnorm", "adaptive_cosine"):
        biases = [GradientBias(params.items(), deltas, prior_scaling=scaling, alpha=0.3) for params in both]
        for _ in range(2):
            grads = {name: torch.randn_like(p) for name, p in both[0].items()}
            found = []
            for params, bias, filled in zip(both, biases, (True, False), strict=True):
                for name, p in params.items():
                    p.grad = grads[name].clone()
                monkeypatch.setattr(grid, "FILLS_COEFFICIENTS", filled)
                found.append(bias.apply_())
            assert_same_bits(*([p.grad for p in params.values()] for params in both))
            if scaling != "absolute":
                assert torch.equal(found[0].cosine, found[1].cosine)
                assert torch.equal(found[0].ratio, found[1].ratio)
    assert len(given) == 6
