"""Training in several processes: fully_shard, tensor parallelism, DDP, a GradScaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import BF16, INT8, STEPS, Run, agree, fsdp_model, loss_of, make_model, make_prior, whole

from drift_kernels import FusedDriftAdamW, PriorError
from drift_kernels.prior.quantized import quantize
from drift_kernels.sharding import local

# FSDP2


def fsdp_run(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    run = Run(fsdp_model(), **options)
    run.steps(0, STEPS)
    return run.result(), run.optimizer.memory_report()


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "state_dtype": INT8}], ids=str)
def test_fully_shard_has_the_bits_of_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    """Every rank sees the same batch, so that the mean gradient is that of one process."""
    alone = Run(make_model(), **options)
    alone.steps(0, STEPS)
    for params, report in ranks.run(fsdp_run, 2, tmp_path, options):
        agree(params, alone.result())
        assert report["prior"] == pytest.approx(2, rel=0.02)


class Reader(nn.Module):
    """A vocabulary of 21 tokens, of which a prior knows 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens = nn.Embedding(21, 128)
        self.o_proj = nn.Linear(128, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.o_proj(self.embed_tokens(tokens))

    def prior(self, dtype: torch.dtype) -> dict[str, Any]:
        torch.manual_seed(4)
        deltas = {"embed_tokens.weight": torch.randn(7, 128), "o_proj.weight": torch.randn(128, 128) * 0.01}
        return {name: quantize(delta, dtype) if dtype == INT8 else delta.to(dtype) for name, delta in deltas.items()}

    def steps(self, prior: Any, **options: Any) -> dict[str, Tensor]:
        optimizer = FusedDriftAdamW(self.named_parameters(), lr=1e-2, prior=prior, **options)
        for _ in range(2):
            self(torch.arange(21)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: whole(param.detach()) for name, param in self.named_parameters()}


def grown_run(dtype: torch.dtype) -> dict[str, Tensor]:
    model = Reader()
    prior = model.prior(dtype)
    return fully_shard(model).steps(prior, prior_scaling="absolute", alpha={"embed": 0.1, "re:o_proj": 0.5})


@pytest.mark.parametrize("dtype", [torch.float32, INT8], ids=str)
def test_added_tokens_and_alpha_by_pattern(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of 21 rows on 4 ranks, one rank has some that the delta knows, and others none or all. `absolute` without
    clipping takes no sums over ranks, and the loss is of every token, on every rank."""
    model = Reader()
    patterns = {"embed": 0.1, "re:o_proj": 0.5}
    alone = model.steps(model.prior(dtype), prior_scaling="absolute", alpha=patterns)
    for params in ranks.run(grown_run, 4, tmp_path, dtype):
        agree(params, alone)


def weights_run() -> str:
    model = Reader()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    try:
        fully_shard(model).steps(weights)
    except PriorError as error:
        return str(error)
    return "nothing was said"


def test_weights_in_place_of_deltas_are_noticed_by_every_rank(tmp_path: Path) -> None:
    for said in ranks.run(weights_run, 2, tmp_path):
        assert "these deltas look like weights" in said


def tensor_parallel_run(data: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("data", "tensor"))
    model = make_model(torch.float32)
    for layer in list(model)[:3]:
        parallelize_module(layer, mesh["tensor"], {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})
        if data > 1:
            fully_shard(layer, mesh=mesh["data"])
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
    return tensor_parallel_steps(model)


def tensor_parallel_steps(model: nn.Module) -> dict[str, Tensor]:
    """With an eps above the gradients' rounding errors: Adam makes whole steps of those where gradients vanish."""
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, eps=1e-4, prior=make_prior(), max_grad_norm=1.0)
    for step in range(STEPS):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(param.detach()) for name, param in model.named_parameters()}


@pytest.mark.parametrize("data", [1, 2])
def test_tensor_parallelism_with_and_without_fully_shard(data: int, tmp_path: Path) -> None:
    """The sums of the products over ranks differ in their order from those of one process: to 1e-5 of the norm."""
    expected = tensor_parallel_steps(make_model(torch.float32))
    for params in ranks.run(tensor_parallel_run, 2 * data, tmp_path, data):
        for name, param in expected.items():
            assert (params[name] - param).norm() <= 1e-5 * param.norm(), name


def scaled() -> tuple[dict[str, Tensor], list[float]]:
    """Of four steps under a GradScaler, one rank's shard of a gradient is infinite in the second."""
    model = fsdp_model()
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), prior_scaling="absolute")
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        if step == 1 and dist.get_rank() == 1:
            local(next(model.parameters()).grad)[0, 0] = float("inf")  # type: ignore[arg-type, index]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    steps = [state["step"].item() for state in optimizer.state.values()]
    return {name: whole(param.detach()) for name, param in model.named_parameters()}, steps


def test_an_infinity_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    model = make_model()
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), prior_scaling="absolute")
    for step in (0, 2, 3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for params, steps in ranks.run(scaled, 2, tmp_path):
        assert set(steps) == {3.0}
        agree(params, dict(model.named_parameters()))


# DDP


def ddp_run(options: dict[str, Any]) -> dict[str, Tensor]:
    model = DistributedDataParallel(make_model())
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), **options)
    for step in range(STEPS):
        loss_of(model, 10 * step + dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("options", [{"rounding": "stochastic", "state_dtype": BF16, "max_grad_norm": 1.0}], ids=str)
def test_replicas_of_ddp_stay_identical(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = ranks.run(ddp_run, 2, tmp_path, options)
    agree(second, first)
    assert not torch.equal(first["module.0.up_proj.weight"], make_model()[0].up_proj.weight)
