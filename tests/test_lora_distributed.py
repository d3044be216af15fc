"""Priors for adapters under fully_shard, in real processes, compared with one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from lora import adapted_model, deltas, loss_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from drift_kernels import FusedDriftAdamW, combine_priors
from drift_kernels.integrations import named_groups
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.sharding import whole

STOP, STEPS = 4, 6


def started(
    stored: Path, sharded: bool, scaling: str, refresh: int, **of_model: object
) -> tuple[nn.Module, FusedDriftAdamW]:
    model = adapted_model(**of_model)
    if sharded:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    prior = lora_prior(model, stored, refresh=refresh)
    normalize = scaling == "absolute"
    # eps is above the gradients' rounding errors: otherwise Adam turns these into full steps where gradients vanish.
    options = {"prior_scaling": scaling, "normalize_to_param": normalize, "alpha": 0.1, "lr": 1e-2, "eps": 1e-4}
    return model, FusedDriftAdamW(named_groups(model), prior=prior, **options)


def train(model: nn.Module, optimizer: FusedDriftAdamW, begin: int, end: int) -> dict[str, Tensor]:
    for step in range(begin, end):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


def uninterrupted_and_resumed(
    stored: Path, folder: Path, scaling: str, refresh: int, dora: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Resume with torch.distributed.checkpoint."""
    model, optimizer = started(stored, True, scaling, refresh, use_dora=dora)
    train(model, optimizer, 0, STOP)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(folder))
    uninterrupted = train(model, optimizer, STOP, STEPS)
    model, optimizer = started(stored, True, scaling, refresh, use_dora=dora)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    found = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(found, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return uninterrupted, train(model, optimizer, STOP, STEPS)


@pytest.mark.parametrize(
    ("scaling", "refresh", "dora"),
    [("absolute", 1, False), ("absolute", 3, False), ("adaptive_cosine", 1, False), ("decoupled", 1, True)],
)
def test_fully_shard(scaling: str, refresh: int, dora: bool, tmp_path: Path) -> None:
    """Bitwise identical to one process if no coefficient depends on norms. (DoRA's forward rounds differently.)"""
    stored = tmp_path / "prior"
    combine_priors([deltas()], stored, weights=[1], dtype=torch.float32)
    expected = train(*started(stored, False, scaling, refresh, use_dora=dora), 0, STEPS)
    for uninterrupted, resumed in ranks.run(
        uninterrupted_and_resumed, 2, tmp_path, stored, tmp_path / "checkpoint", scaling, refresh, dora
    ):
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], uninterrupted[name]), name
            if scaling == "absolute" and not dora:
                assert torch.equal(uninterrupted[name], tensor), name
            torch.testing.assert_close(uninterrupted[name], tensor, rtol=1e-5, atol=1e-6)
