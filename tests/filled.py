"""Optimizers on equal models: one uses coefficients filled by a kernel, the other those of coefficients.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import grid
import pytest
import torch
from problems import DEVICE, F32, GRID, assert_same_bits
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW
from drift_kernels.kernels import backends
from drift_kernels.kernels.filling import Filling

Params = dict[str, nn.Parameter]
SHAPES = {"layers.0.weight": (33, 65), "layers.1.weight": (3, 17), "layers.1.bias": (33,), "norm.weight": (7,)}
UNKNOWN = ("norm.weight",)  # not in the prior


@contextmanager
def on_backend(name: str = GRID) -> Iterator[None]:
    """Make "auto" choose the kernels on the host, or on the simulated device, instead of those on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.AUTO, DEVICE.type, (name,))
        backends.resolve.cache_clear()
        yield
    backends.resolve.cache_clear()


def random_between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def models(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = F32) -> tuple[Params, Params]:
    values = {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}
    first, second = ({name: nn.Parameter(value.clone()) for name, value in values.items()} for _ in range(2))
    return first, second


def deltas_of(params: Params) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) * 0.1 for name, p in params.items() if name not in UNKNOWN}


def random_groups(params: Params) -> list[dict[str, Any]]:
    """One group per two parameters, each with its own hyperparameters."""
    named, groups = list(params.items()), []
    for index in range(0, len(named), 2):
        group = {
            "lr": random_between(0, 1e-1),
            "betas": (random_between(0.0, 0.99), random_between(0.9, 0.9999)),
            "eps": 10 ** random_between(-12, -6),
            "weight_decay": random_between(0, 0.2),
            "maximize": index % 4 == 0,
            "alpha": random_between(-1, 1),
            "normalize_to_param": index % 4 == 2,
        }
        groups.append(group | {"params": named[index : index + 2]})
    return groups


class Pair:
    """The same steps with coefficients filled by the kernel, and with those of coefficients.py."""

    def __init__(
        self,
        models: tuple[Params, Params],
        groups: Callable[[Params], list[Any]],
        backend: ModuleType = grid,
        **options: Any,
    ) -> None:
        self.models = models
        self.backend = backend
        self.optimizers = []
        made = groups(models[0])
        for params in models:
            own = [{**group, "params": [(name, params[name]) for name, _ in group["params"]]} for group in made]
            self.optimizers.append(FusedDriftAdamW(own, **options))

    def step(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Params], None] = lambda params: None) -> None:
        for p in self.models[0].values():
            p.grad = torch.randn_like(p) * 0.3
        spoil(self.models[0])
        for name, p in self.models[1].items():
            grad = self.models[0][name].grad
            p.grad = None if grad is None else grad.clone()
        for fills, optimizer in zip((True, False), self.optimizers, strict=True):
            monkeypatch.setattr(self.backend, "FILLS_COEFFICIENTS", fills)
            optimizer.step()
        self.compare()

    def compare(self) -> None:
        first, second = self.optimizers
        tables, figures = [], []
        for optimizer in self.optimizers:
            batches = optimizer._engine.batches
            tables.append([batch.coefficients.table for batch in batches])
            figures.append([optimizer.grad_norm, optimizer.prior_cosine, optimizer.prior_ratio])
            for batch in batches:
                figures[-1].append(batch.coefficients.steps.clone())
        assert_same_bits(*tables)
        for one, other in zip(*figures, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        params = [list(model.values()) for model in self.models]
        assert_same_bits([p.detach() for p in params[0]], [p.detach() for p in params[1]])
        for one, other in zip(*params, strict=True):
            for key, value in first.state[one].items():
                assert_same_bits([value.float()], [second.state[other][key].float()])


def fills(monkeypatch: pytest.MonkeyPatch) -> list[Filling]:
    """Record the Fillings that the kernel receives from now on."""
    given: list[Filling] = []
    original = grid.fill_coefficients
    monkeypatch.setattr(grid, "fill_coefficients", lambda filling: (given.append(filling), original(filling))[1])
    return given
