"""normalize_to_param goes by the norms that a prior has recorded, of the base that it was built from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from checkpoints import write_checkpoint
from lora import adapted_model, deltas, text_model, zero_gradients
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from drift_kernels import GradientBias, build_prior
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.sharding import whole

ALPHA = 0.5
FACTOR = 3.0  # norm(W) of that base, in norms of the weights that are trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = {name: FACTOR * weight for name, weight in text_model().state_dict().items()}
    expert = base | {name: base[name] + delta for name, delta in deltas(which="proj").items()}
    for name, weights in (("base", base), ("expert", expert)):
        write_checkpoint(tmp_path / name, {key: weight.contiguous() for key, weight in weights.items()})
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    return tmp_path / "prior"


def biases(model: nn.Module, prior: Any, alpha: float) -> dict[str, Tensor]:
    """What gradients of zeros become."""
    zero_gradients(model)
    GradientBias(
        model.named_parameters(), prior, alpha=alpha, prior_scaling="absolute", normalize_to_param=True
    ).apply_()
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


def assert_recorded(found: dict[str, Tensor], measured: dict[str, Tensor]) -> None:
    """As with norms of the trained weights, and alpha as many times as large: to 1e-5 of the largest element."""
    assert any(bool(grad.any()) for grad in measured.values())
    for name, grad in measured.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_of_weights(folder: Path) -> None:
    model = text_model()
    assert_recorded(biases(model, folder, ALPHA), biases(model, deltas(which="proj"), FACTOR * ALPHA))


def test_of_weights_under_adapters(folder: Path) -> None:
    model = adapted_model()
    found = biases(model, lora_prior(model, folder), ALPHA)
    assert_recorded(found, biases(model, lora_prior(model, deltas(which="proj")), FACTOR * ALPHA))


def of_shards(folder: Path) -> dict[str, Tensor]:
    return biases(fully_shard(text_model()), folder, ALPHA)


def test_of_shards(folder: Path, tmp_path: Path) -> None:
    expected = biases(text_model(), deltas(which="proj"), FACTOR * ALPHA)
    for found in ranks.run(of_shards, 2, tmp_path, folder):
        assert_recorded(found, expected)
