"""The result of a trainer's fine-tuning, for the tests of TRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch

FEW = 4  # steps, if results are compared bitwise
ADAPTERS = pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def of_adapters(names: list[str]) -> list[str]:
    """The names of the factors in the PEFT model, for the weights of the model."""
    weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return [f"base_model.model.{name}.lora_{factor}.default.weight" for name in weights for factor in "AB"]


def expect_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, param in one.items():
        assert torch.equal(param, other[name]), name
