"""Models that a module holds, as a LightningModule does: bound by the names under its attribute, or an error that says
what to do; with adapters, with parts of the model alone, and for parameters that were flattened."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, GradientBias, PriorError, PriorMismatchError
from drift_kernels.integrations import check_in_use, drift_optimizer, named_groups
from examples import tiny

peft = pytest.importorskip("peft")


class Holder(nn.Module):
    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)
        self.classifier = nn.Linear(48, 3)


def prior_with_head() -> dict[str, Tensor]:
    model = tiny.base_model()
    return tiny.expert_prior() | {"lm_head.weight": torch.ones_like(model.lm_head.weight)}


def stepped(optimizer: FusedDriftAdamW) -> FusedDriftAdamW:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("attribute", ["model", "lm", "model.inner"])
def test_a_held_model_is_bound_with_all_that_the_table_knows(attribute: str, caplog: pytest.LogCaptureFixture) -> None:
    """The head too, which does not stand beside the layers; its bits are those of the model alone."""
    prior, (one, *more) = prior_with_head(), attribute.split(".")
    held, alone = tiny.base_model(), tiny.base_model()
    module = Holder(**{one: Holder(**{more[0]: held}) if more else held})
    with caplog.at_level(logging.INFO, "drift_kernels"):
        optimizer = stepped(FusedDriftAdamW(named_groups(module), prior=prior))
    assert caplog.text.count(f"the prior is matched with the model held as '{attribute}'") == 1
    assert sorted(optimizer.prior_names) == sorted(f"{attribute}.{name}" for name in prior)
    stepped(FusedDriftAdamW(named_groups(alone), prior=prior))
    assert tiny.same(held, alone)


def test_a_part_of_a_held_model_is_enough() -> None:
    module = Holder(model=tiny.base_model())
    trained = [name for name, _ in module.named_parameters() if "layers.1.self_attn.q_proj" in name]
    for name, param in module.named_parameters():
        param.requires_grad_(name in trained)
    optimizer = FusedDriftAdamW(named_groups(module), prior=tiny.expert_prior())
    assert optimizer.covered_names == trained


@pytest.mark.parametrize("held", [False, True])
def test_adapters_and_modules_to_save(held: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["down_proj"])
    model: nn.Module = peft.get_peft_model(tiny.base_model(), config)
    module = Holder(model=model) if held else model
    optimizer = stepped(drift_optimizer(module, prior=tiny.expert_prior()))
    trained = [name for name, param in module.named_parameters() if param.requires_grad and "classifier" not in name]
    assert sorted(optimizer.prior_names) == sorted(trained)
    assert sum("modules_to_save" in name for name in trained) == 2
    assert sum("lora_" in name for name in trained) == 8


def test_two_held_models_are_an_error_that_says_what_to_do() -> None:
    module = Holder(student=tiny.base_model(), teacher=tiny.base_model().requires_grad_(False))
    with pytest.raises(PriorMismatchError, match=r"student\., teacher\.; pass the parameters of only one of them"):
        FusedDriftAdamW(module.named_parameters(), prior=tiny.expert_prior())
    optimizer = FusedDriftAdamW(named_groups(module), prior=tiny.expert_prior())
    assert sorted(optimizer.covered_names) == sorted(f"student.{name}" for name in tiny.expert_prior())


def test_another_model_of_these_names_is_not_bound() -> None:
    """One list of layers has the prior's names, in other shapes: it is not the model."""
    module = Holder(model=tiny.base_model())
    module.model.model.layers[0].self_attn.q_proj = nn.Linear(48, 50)
    with pytest.raises(PriorMismatchError, match="no parameter matches the prior"):
        FusedDriftAdamW(module.named_parameters(), prior=tiny.expert_prior())


def flattened(optimizer: FusedDriftAdamW) -> FusedDriftAdamW:
    """As ZeRO leaves the param groups of an optimizer that it was given."""
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([param.detach().flatten() for param in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    return optimizer


@pytest.mark.parametrize("notice", [check_in_use, FusedDriftAdamW.step])
def test_flattened_parameters_are_an_error_that_says_what_to_do(notice: Any) -> None:
    optimizer = flattened(FusedDriftAdamW(named_groups(tiny.base_model()), prior=tiny.expert_prior()))
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    with pytest.raises(PriorError, match=r"DeepSpeed's ZeRO flattens parameters.*attach_prior"):
        notice(optimizer)
    assert all(torch.equal(b, group["params"][0]) for b, group in zip(before, optimizer.param_groups, strict=True))


def test_gradients_of_a_held_model_are_biased_too() -> None:
    module = Holder(model=tiny.base_model())
    bias = GradientBias(module.named_parameters(), tiny.expert_prior())
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    assert len(bias.apply_().names) == len(tiny.expert_prior())
