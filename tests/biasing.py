"""Models, deltas and gradients for tests of the bias alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drift_kernels import Prior
from drift_kernels.kernels import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in backends.NAMES if backends.load(name).unavailable(DEVICE) is None]
SCALINGS = ("absolute", "gradnorm", "adaptive_cosine")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = {"layers.0.weight": (33, 65), "layers.0.bias": (33,), "norm.weight": (7,), "empty": (0, 4)}
FREE = "vision.weight"  # not covered by the prior

Params = dict[str, nn.Parameter]


def make_params(dtype: torch.dtype = F32) -> Params:
    shapes = {**SHAPES, FREE: (5, 3)}
    return {name: nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for name, shape in shapes.items()}


def make_deltas() -> dict[str, Tensor]:
    return {name: torch.randn(shape, device=DEVICE) * 0.1 for name, shape in SHAPES.items()}


def copies(params: Params) -> Params:
    return {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}


def random_grads(*models: Params) -> dict[str, Tensor]:
    """Give every model the same fresh gradients; return another copy."""
    kept = {}
    for name, p in models[0].items():
        kept[name] = torch.randn(p.shape, device=DEVICE).to(p.dtype)
        for params in models:
            params[name].grad = kept[name].clone()
    return kept


def grads_of(params: Params) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in params.items() if p.grad is not None}


def coefficient(grad: Tensor, delta: Tensor, alpha: float, scaling: str) -> float:
    """The coefficient c, from the method's formula, in float64."""
    g, d = grad.double().flatten(), delta.double().flatten()
    if scaling == "absolute":
        return alpha
    if not g.norm() or not d.norm():
        return 0.0
    cosine = float(g @ d / (g.norm() * d.norm()))
    return alpha * float(g.norm() / d.norm()) * (1.0 if scaling == "gradnorm" else (1 + cosine) / 2)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def assert_close(params: Params, expected: Params, relative: float) -> None:
    """Every element within `relative` of the tensor's largest, or of 1: all start as normal numbers, and one may end
    near zero."""
    for name in params:
        a, e = params[name].detach().double(), expected[name].detach().double()
        bound = relative * max(1.0, float(e.abs().max())) if e.numel() else 0.0
        assert (a - e).abs().le(bound).all(), f"{name}: off by {(a - e).abs().max():.3g}, bound {bound:.3g}"


def watched_loads(monkeypatch: pytest.MonkeyPatch) -> dict[Prior, list[str]]:
    """Record the names of the deltas loaded from now on."""
    loaded: dict[Prior, list[str]] = defaultdict(list)
    load = Prior.load_stored

    def watched(prior: Prior, name: str, *args: Any, **options: Any) -> Any:
        loaded[prior].append(name)
        return load(prior, name, *args, **options)

    monkeypatch.setattr(Prior, "load_stored", watched)
    return loaded


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.inner(self.embed_tokens(tokens))))

    def loss(self) -> Tensor:
        tokens = torch.randint(11, (6,), device=DEVICE)
        return nn.functional.cross_entropy(self(tokens), tokens.roll(1))


def two_models() -> tuple[Tied, Tied, dict[str, Tensor]]:
    model = Tied().to(DEVICE)
    deltas = {name: torch.randn_like(p) for name, p in model.named_parameters() if name != "inner.bias"}
    return model, copy.deepcopy(model), deltas


def backward(*models: Tied) -> None:
    """Run backward on the same loss in every model."""
    state = torch.get_rng_state()
    for model in models:
        torch.set_rng_state(state)
        model.loss().backward()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return grads_of(dict(model.named_parameters()))
