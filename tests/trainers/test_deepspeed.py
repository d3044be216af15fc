"""DeepSpeed's ZeRO 1 and 2, on its CPU accelerator: attach_prior trains; FusedDriftAdamW says that it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import STEPS, loss_of, make_model, make_prior

from drift_kernels import FusedDriftAdamW, PriorError, attach_prior
from drift_kernels.kernels.scalings import GradientScaling

pytest.importorskip("deepspeed", reason="make test-trainers TRAINER=deepspeed")


def hooked(scaling: GradientScaling = "absolute") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(torch.float32)
    attach_prior(model, make_prior(), prior_scaling=scaling, alpha=0.5)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def ours() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(torch.float32)
    return model, FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior())


def zero(
    stage: int, make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], micro_batches: int = 1
) -> dict[str, Tensor] | str:
    """The parameters at the end, or the first step's error."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.init_distributed("gloo")
    model, optimizer = make()  # before DeepSpeed's own hooks, which take the gradients away
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS * micro_batches):
        engine.backward(loss_of(engine, step, torch.float32))
        try:
            engine.step()
        except PriorError as error:
            return str(error)
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_as_one_process(stage: int, tmp_path: Path) -> None:
    """Every rank sees the same batch, so that the mean gradient is that of one process; but a flat AdamW rounds
    otherwise: to 1e-5 of the way that a parameter went."""
    model, optimizer = hooked()
    for step in range(STEPS):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    agree(model, ranks.run(zero, 2, tmp_path, stage, hooked))


@pytest.mark.parametrize("scaling", ["gradnorm", "adaptive_cosine"])
def test_zero_2_biases_each_micro_batch_by_its_own_gradient(scaling: GradientScaling, tmp_path: Path) -> None:
    """So that the bias of a step is the sum over its micro-batches: as in the authors' hooks."""
    model, optimizer = hooked(scaling)
    for step in range(STEPS):
        sums = [torch.zeros_like(param) for param in model.parameters()]
        for micro_batch in (2 * step, 2 * step + 1):
            (loss_of(model, micro_batch, torch.float32) / 2).backward()
            for total, param in zip(sums, model.parameters(), strict=True):
                total += param.grad
            optimizer.zero_grad()
        for total, param in zip(sums, model.parameters(), strict=True):
            param.grad = total
        optimizer.step()
        optimizer.zero_grad()
    agree(model, ranks.run(zero, 2, tmp_path, 2, partial(hooked, scaling), 2))


def agree(model: nn.Module, of_ranks: list[dict[str, Tensor]]) -> None:
    start = dict(make_model(torch.float32).named_parameters())
    for params in of_ranks:
        for name, param in model.named_parameters():
            way = (param - start[name]).norm()
            assert (params[name] - param).norm() <= 1e-5 * way, name


@pytest.mark.parametrize("stage", [1, 2])
def test_flattened_parameters_are_an_error_that_names_the_cure(stage: int, tmp_path: Path) -> None:
    for message in ranks.run(zero, 2, tmp_path, stage, ours):
        assert "DeepSpeed's ZeRO flattens parameters" in message
        assert "attach_prior(model, prior)" in message
