"""Checkpoints of several processes: saved, resumed with another number of ranks, killed; and ranks that differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from training import KINDS, STEPS, Run, agree, fsdp_model, loss_of, make_model, make_prior, whole

from drift_kernels import FusedDriftAdamW, PriorMismatchError
from drift_kernels.sharding import local

# Checkpoints


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
    """4 -> 2 -> 1 ranks, each bitwise identical to the uninterrupted run, with seed and schedules."""
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
    """Save twice, and be killed before the second is complete."""
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


def accelerate(**options: Any) -> tuple[Any, nn.Module, Any]:
    """As Accelerate does under FSDP2: it builds the optimizer first, then replaces the parameters by shards.

    (Accelerate shards only on GPUs; on a CPU it must be made to.)
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=1000,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = make_model()
    options = {"prior": make_prior(), "prior_scaling": "absolute", "seed": 5} | options
    return accelerator, *accelerator.prepare(model, FusedDriftAdamW(model.named_parameters(), lr=1e-2, **options))


def accelerated(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Take half of the steps, then the other half from what was saved."""
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    results = {}
    for kind, options in KINDS.items():
        for half in range(2):
            accelerator, model, optimizer = accelerate(**(options if half == 0 else options | {"seed": 99}))
            plugin = accelerator.state.fsdp_plugin
            if half == 1:
                load_fsdp_model(plugin, accelerator, model, folder / kind)
                load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / kind)
            for step in range(STEPS // 2 * half, STEPS // 2 * (half + 1)):
                accelerator.backward(loss_of(model, step))
                optimizer.step()
                optimizer.zero_grad()
            if half == 0:
                save_fsdp_model(plugin, accelerator, model, folder / kind)
                save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / kind)
        assert all(isinstance(param, DTensor) for param in model.parameters())
        results[kind] = {name: whole(param.detach()) for name, param in model.named_parameters()}
    return results


def test_accelerate_replaces_parameters_saves_and_resumes(tmp_path: Path) -> None:
    expected = {}
    for kind, options in KINDS.items():
        model = make_model()
        options = {"prior": make_prior(), "prior_scaling": "absolute", "seed": 5} | options
        optimizer = FusedDriftAdamW(model.named_parameters(), lr=1e-2, **options)
        for step in range(STEPS):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected[kind] = {name: param.detach() for name, param in model.named_parameters()}
    for results in ranks.run(accelerated, 2, tmp_path, tmp_path / "saved"):
        for kind, params in results.items():
            agree(params, expected[kind])
