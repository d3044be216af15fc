"""A small model, its batches, its prior and its run, for distributed tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from drift_kernels import AlphaScheduler, FusedDriftAdamW, linear_anneal

BF16, INT8 = torch.bfloat16, torch.int8
WIDTH, HIDDEN = 128, 256
STEPS = 6

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 states": {"state_dtype": BF16, "rounding": "stochastic"},
    "int8 states": {"state_dtype": INT8, "rounding": "stochastic"},
    "masters": {"master_weights": True},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(x)))


def make_model(dtype: torch.dtype = BF16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(3)), nn.Linear(WIDTH, 5)).to(dtype)


def make_prior(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: param.shape for name, param in make_model().named_parameters() if "bias" not in name}
    return {name: (0.02 * torch.randn(shape, generator=generator)).to(BF16) for name, shape in shapes.items()}


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, WIDTH, generator=generator), torch.randint(5, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


class Run:
    """A model with its optimizer and schedules."""

    def __init__(self, model: nn.Module, total: int = STEPS, **options: Any) -> None:
        self.model = model
        options = {"prior": make_prior(), "prior_scaling": "absolute", "seed": 5} | options
        self.optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, **options)
        self.lr = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)
        self.alpha = AlphaScheduler(self.optimizer, linear_anneal(total))

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            loss_of(self.model, step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr.step()
            self.alpha.step()

    def result(self) -> dict[str, Tensor]:
        return {name: whole(param.detach()).clone() for name, param in self.model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fsdp_model() -> nn.Module:
    model = make_model()
    for layer in list(model)[:3]:
        fully_shard(layer)
    return fully_shard(model)


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
