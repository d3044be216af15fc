"""DeepSpeed's ZeRO 1 and 2, on its CPU accelerator: attach_prior trains; FusedDriftAdamW says that it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import STEPS, loss_of, make_model, make_prior

from drift_kernels import FusedDriftAdamW, PriorError, attach_prior

pytest.importorskip("deepspeed", reason="make test-trainers TRAINER=deepspeed")


def hooked() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(torch.float32)
    attach_prior(model, make_prior(), prior_scaling="absolute", alpha=0.5)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def ours() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(torch.float32)
    return model, FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior())


def zero(stage: int, make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]) -> dict[str, Tensor] | str:
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
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
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
    start = dict(make_model(torch.float32).named_parameters())
    model, optimizer = hooked()
    for step in range(STEPS):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    for params in ranks.run(zero, 2, tmp_path, stage, hooked):
        for name, param in model.named_parameters():
            way = (param - start[name]).norm()
            assert (params[name] - param).norm() <= 1e-5 * way, name


@pytest.mark.parametrize("stage", [1, 2])
def test_flattened_parameters_are_an_error_that_names_the_cure(stage: int, tmp_path: Path) -> None:
    for message in ranks.run(zero, 2, tmp_path, stage, ours):
        assert "DeepSpeed's ZeRO has made one of many" in message
        assert "attach_prior(model, prior)" in message
