"""transformers' Trainer in two processes: DDP, and FSDP2, which replaces the parameters of the optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from drift_kernels.integrations import unwrap_optimizer
from examples import tiny, transformers_trainer

STEPS, BATCH = 4, 16


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    tiny.quiet()


def trained(folder: Path, prior: tiny.Prior, state: dict[str, Tensor], sharded: bool) -> dict[str, Any]:
    """Train the example in this rank: its parameters, and the prior's metrics in its log, of every step.

    eps is above the rounding errors of gradients: otherwise Adam turns these into full steps where gradients vanish.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    tiny.quiet()
    model, pairs = tiny.new_model(), tiny.training_pairs(STEPS * BATCH)
    model.load_state_dict(state)
    tiny.base_model, tiny.training_pairs = lambda: model, lambda _: pairs
    tiny.BATCH_SIZE = BATCH // world
    trainer = transformers_trainer.build(prior, folder, steps=STEPS, eps=1e-4)
    if sharded:  # Accelerate shards only on GPUs; on a CPU it must be made to
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        )
        trainer.accelerator.state.distributed_type = DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin = plugin
        trainer.is_fsdp_enabled = True
    trainer.train()
    params = {name.removeprefix("module."): param.detach() for name, param in trainer.model_wrapped.named_parameters()}
    return {
        "sharded": all(isinstance(param, DTensor) for param in params.values()),
        "params": {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()},
        "names": sorted(unwrap_optimizer(trainer.optimizer).prior_names),
        "figures": [
            {key: value for key, value in entry.items() if key.startswith("prior/")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    folder, prior, state = tmp_path / "ranks", tiny.expert_prior(), tiny.base_model().state_dict()
    folder.mkdir()
    (alone,) = ranks.run(trained, 1, folder, tmp_path, prior, state, False)
    for sharded in (False, True):
        first, second = ranks.run(trained, 2, folder, tmp_path, prior, state, sharded)
        assert first["sharded"] == second["sharded"] == sharded
        assert first["names"] == second["names"] == sorted(prior)
        assert first["figures"] == second["figures"]
        assert len(first["figures"]) == STEPS
        for step, (figures, expected) in enumerate(zip(first["figures"], alone["figures"], strict=True)):
            assert figures == pytest.approx(expected, abs=1e-4), step  # sums in another order: about 1e-7
        for name, param in alone["params"].items():
            assert torch.equal(first["params"][name], second["params"][name])
            torch.testing.assert_close(first["params"][name], param, rtol=1e-4, atol=1e-5)
