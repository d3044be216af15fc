"""Training in several processes: fully_shard, DDP, and checkpoints across numbers of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from drift_kernels import AlphaScheduler, FusedDriftAdamW, PriorMismatchError, linear_anneal
from drift_kernels.sharding import local

BF16, INT8 = torch.bfloat16, torch.int8
WIDTH, HIDDEN = 128, 256
STEPS = 6


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


def tensor_parallel_run(data: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("data", "tensor"))
    model = make_model(torch.float32)
    for layer in list(model)[:3]:
        parallelize_module(layer, mesh["tensor"], {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})
        if data > 1:
            fully_shard(layer, mesh=mesh["data"])
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), max_grad_norm=1.0)
    for step in range(STEPS):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(param.detach()) for name, param in model.named_parameters()}


@pytest.mark.parametrize("data", [1, 2])
def test_tensor_parallelism_with_and_without_fully_shard(data: int, tmp_path: Path) -> None:
    """The sums of the products over ranks differ in their order from those of one process: to 1e-5 of the norm."""
    model = make_model(torch.float32)
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), max_grad_norm=1.0)
    for step in range(STEPS):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    for params in ranks.run(tensor_parallel_run, 2 * data, tmp_path, data):
        for name, param in model.named_parameters():
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


def accelerated() -> dict[str, Tensor]:
    """As Accelerate does it under FSDP2: the optimizer is built first, then the parameters are replaced by shards.

    (Accelerate shards on GPUs alone; on a CPU it has to be told that it does.)
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1000)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = make_model(torch.float32)
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), prior_scaling="absolute")
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step, torch.float32))
        optimizer.step()
        optimizer.zero_grad()
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return {name: whole(param.detach()) for name, param in model.named_parameters()}


def test_accelerate_replaces_parameters_after_the_optimizer_is_built(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior=make_prior(), prior_scaling="absolute")
    for step in range(STEPS):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    for params in ranks.run(accelerated, 2, tmp_path):
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


# Checkpoints


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 states": {"state_dtype": BF16, "rounding": "stochastic"},
    "int8 states": {"state_dtype": INT8, "rounding": "stochastic"},
    "masters": {"master_weights": True},
}


def model_for(world: int) -> nn.Module:
    return make_model() if world == 1 else fsdp_model()


def save(folder: Path, flat: bool, asynchronous: bool) -> None:
    for kind, options in KINDS.items():
        run = Run(model_for(dist.get_world_size()), **options)
        run.steps(0, STEPS // 2)
        model, optimizer = get_state_dict(
            run.model, run.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
        )
        state = {"model": model, "optimizer": optimizer, "lr": run.lr.state_dict(), "alpha": run.alpha.state_dict()}
        if asynchronous:
            dcp.async_save(state, checkpoint_id=folder / kind).result()
        else:
            dcp.save(state, checkpoint_id=folder / kind)


def resume(folder: Path, flat: bool) -> dict[str, dict[str, Tensor]]:
    results = {}
    for kind, options in KINDS.items():
        run = Run(model_for(dist.get_world_size()), **(options | {"seed": 99}))
        settings = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = get_state_dict(run.model, run.optimizer, options=settings)
        for key, state in run.optimizer.state.items():
            assert not any(bool(local(t).any()) for t in state.values()), f"{kind}: a trace of the prior in {key.shape}"
        state = {"model": model, "optimizer": optimizer, "lr": run.lr.state_dict(), "alpha": run.alpha.state_dict()}
        dcp.load(state, checkpoint_id=folder / kind)
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=settings,
        )
        run.lr.load_state_dict(state["lr"])
        run.alpha.load_state_dict(state["alpha"])
        run.steps(STEPS // 2, STEPS)
        results[kind] = run.result()
    return results


@pytest.mark.parametrize(("flat", "asynchronous"), [(False, False), (True, True)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(flat: bool, asynchronous: bool, tmp_path: Path) -> None:
    """4 -> 2 -> 1 ranks, each bit for bit the run that was not interrupted, seed and schedules included."""
    expected = {}
    for kind, options in KINDS.items():
        alone = Run(make_model(), **options)
        alone.steps(0, STEPS)
        expected[kind] = alone.result()
    for saved in (4, 2) if not flat else (2,):
        folder = tmp_path / f"saved-{saved}"
        ranks.run(save, saved, tmp_path, folder, flat, asynchronous)
        for world in {4: (4, 2), 2: (2, 1)}[saved]:
            for results in ranks.run(resume, world, tmp_path, folder, flat):
                for kind, params in results.items():
                    agree(params, expected[kind])


# Failures


def save_twice(folder: Path) -> None:
    """And be killed before the second is complete."""
    run = Run(fsdp_model())
    for step in range(2):
        run.steps(step, step + 1)
        if step == 1:
            FileSystemWriter.finish = lambda *_, **__: os._exit(0)  # type: ignore[method-assign]
        model, optimizer = get_state_dict(run.model, run.optimizer)
        try:
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / f"step-{step}")
        except Exception:  # the other rank is gone
            os._exit(0)


def test_a_save_that_is_killed_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (tmp_path / "ranks").mkdir()
    with pytest.raises(FileNotFoundError):  # no rank returns
        ranks.run(save_twice, 2, tmp_path / "ranks", folder)
    alone = Run(make_model())
    alone.steps(0, 1)
    run = Run(make_model())
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    with pytest.raises(CheckpointException):
        dcp.load(state, checkpoint_id=folder / "step-1", no_dist=True)
    dcp.load(state, checkpoint_id=folder / "step-0", no_dist=True)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    agree(run.result(), alone.result())


def differing_priors() -> str:
    optimizer = FusedDriftAdamW(fsdp_model().named_parameters(), prior=make_prior(dist.get_rank()))
    loss_of_all = sum(whole(p).float().sum() for p in optimizer.param_groups[0]["params"])
    loss_of_all.backward()
    with pytest.raises(PriorMismatchError, match="ranks have different priors") as error:
        optimizer.step()
    return str(error.value)


def test_ranks_with_different_priors_are_told(tmp_path: Path) -> None:
    assert len(set(ranks.run(differing_priors, 2, tmp_path))) == 2
