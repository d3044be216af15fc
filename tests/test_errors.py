"""Bad input: a named error that says what was expected and found, before anything has changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drift_kernels import (
    AlphaScheduler,
    BackendUnavailableError,
    FusedDriftAdamW,
    PriorError,
    PriorFormatError,
    PriorMismatchError,
    linear_anneal,
)
from drift_kernels.kernels import backends


def named() -> list[tuple[str, nn.Parameter]]:
    return [
        ("layers.0.mlp.up_proj.weight", nn.Parameter(torch.randn(4, 3))),
        ("norm.weight", nn.Parameter(torch.randn(3))),
    ]


DELTA = {"layers.0.mlp.up_proj.weight": torch.ones(4, 3)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": math.nan}, ValueError, "lr must be finite, got lr=nan"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got lr='fast'"),
        ({"lr": True}, TypeError, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got betas\[1\]=1.0"),
        ({"betas": 0.9}, TypeError, "betas must be a sequence of two numbers, got betas=0.9 of type float"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be finite"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got alpha=nan"),
        ({"alpha": None}, TypeError, "alpha must be a number"),
        ({"prior_scaling": "cosine"}, ValueError, "prior_scaling must be one of absolute, gradnorm.*got 'cosine'"),
        ({"backend": "mkl"}, ValueError, "backend must be 'auto' or one of .*got 'mkl'"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be positive"),
    ],
)
def test_hyperparameters(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FusedDriftAdamW(named(), prior=DELTA, **options)


def test_a_hyperparameter_spoiled_between_steps_changes_nothing() -> None:
    params = named()
    optimizer = FusedDriftAdamW(params, prior=DELTA)
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for _, p in params]
    optimizer.param_groups[0]["alpha"] = math.nan
    with pytest.raises(ValueError, match=r"alpha must be finite.*group 0"):
        optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(params, before, strict=True))
    assert all(float(state["step"]) == 1.0 for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        (torch.zeros(1, 4).expand(3, 4), ValueError, "parameter w is expanded: several of its elements share memory"),
        (torch.zeros(3, dtype=torch.float64), TypeError, "parameter w has dtype torch.float64; expected one of"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "parameter w has dtype torch.complex64"),
        (torch.eye(3).to_sparse(), TypeError, "parameter w is sparse"),
    ],
)
def test_parameters(tensor: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FusedDriftAdamW([("w", nn.Parameter(tensor))])
    good = FusedDriftAdamW([("good", nn.Parameter(torch.zeros(2)))])
    with pytest.raises(error, match=words):
        good.add_param_group({"params": [("w", nn.Parameter(tensor))]})
    assert len(good.param_groups) == 1


@pytest.mark.parametrize("after_a_good_step", [False, True])
def test_a_sparse_gradient(after_a_good_step: bool) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    other = nn.Parameter(torch.zeros(2))
    optimizer = FusedDriftAdamW([("other", other), ("embedding.weight", embedding.weight)])
    if after_a_good_step:
        embedding.weight.grad, other.grad = torch.ones(10, 4), torch.ones(2)
        optimizer.step()
        embedding.weight.grad = None
    before = [p.detach().clone() for p in (other, embedding.weight)]
    embedding(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(TypeError, match=r"gradient of parameter embedding\.weight is sparse"):
        optimizer.step()
    assert torch.equal(other, before[0])
    assert torch.equal(embedding.weight, before[1])
    assert all(float(state["step"]) == 1.0 for state in optimizer.state.values())


def test_priors(tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=r"pass model\.named_parameters\(\)"):
        FusedDriftAdamW([p for _, p in named()], prior=DELTA)
    with pytest.raises(PriorMismatchError, match="other"):
        FusedDriftAdamW(named(), prior={"layers.7.other.weight": torch.ones(4, 3)})
    with pytest.raises(PriorMismatchError, match=r"layers.0.mlp.up_proj.weight \[4, 3\] vs\. \[3, 4\]"):
        FusedDriftAdamW(named(), prior={"layers.0.mlp.up_proj.weight": torch.ones(3, 4)})
    with pytest.raises(PriorError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        FusedDriftAdamW(named(), prior={"layers.0.mlp.up_proj.weight": torch.full((4, 3), math.nan)})
    with pytest.raises(PriorFormatError):
        FusedDriftAdamW(named(), prior=tmp_path)
    with pytest.raises(TypeError, match="prior must be"):
        FusedDriftAdamW(named(), prior=3)  # type: ignore[arg-type]


def test_backends() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(BackendUnavailableError, match="'cpu' is unavailable: it supports CPU tensors only, not meta"):
        backends.resolve("cpu", torch.device("meta"))
    with pytest.raises(BackendUnavailableError, match="CPU tensors only, not meta"):
        FusedDriftAdamW([nn.Parameter(torch.zeros(2, device="meta"))], backend="cpu")
    assert backends.resolve("reference", cpu).__name__.endswith("reference")


def test_auto_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    compiled = backends.load("cpu")
    monkeypatch.setattr(compiled, "unavailable", lambda device: "cannot import its compiled extension")
    backends.resolve.cache_clear()
    try:
        cpu = torch.device("cpu")
        assert backends.resolve("auto", cpu).__name__.endswith("reference")
        assert backends.resolve("auto", cpu).__name__.endswith("reference")
        assert [record.getMessage() for record in caplog.records] == [
            "backend='auto' falls back to 'reference' on cpu: 'cpu' is unavailable: cannot import its compiled "
            "extension"
        ]
        with pytest.raises(BackendUnavailableError, match="cannot import"):
            backends.resolve("cpu", cpu)
    finally:
        backends.resolve.cache_clear()


def test_schedules() -> None:
    optimizer = FusedDriftAdamW(named(), prior=DELTA)
    with pytest.raises(ValueError, match="expected 1 alpha_lambdas"):
        AlphaScheduler(optimizer, [lambda _: 1.0, lambda _: 1.0])
    with pytest.raises(ValueError, match="has no alpha"):
        AlphaScheduler(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), linear_anneal(3))
    with pytest.raises(ValueError, match="total_steps must be positive"):
        linear_anneal(0)
    with pytest.raises(ValueError, match="has no initial_alpha"):
        AlphaScheduler(optimizer, linear_anneal(3), last_epoch=4)
