"""examples/qlora.py: adapters over a 4-bit base, with a prior, from checkpoints to saved files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
from bitsandbytes.nn import Linear4bit
from lora import deltas, text_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from drift_kernels import FusedDriftAdamW, GradientBias, Prior
from drift_kernels.integrations import unwrap_optimizer
from drift_kernels.integrations.peft import lora_prior
from examples import qlora, tiny

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.quiet()
    folder = tmp_path_factory.mktemp("qlora")
    qlora.checkpoints(folder)
    return folder


def adapters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in trainer.model.named_parameters() if param.requires_grad}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_stopped_ends_as_one_that_did_not(folder: Path) -> None:
    whole = qlora.train(True, folder, steps=STEPS)
    half = qlora.train(True, folder, steps=STEPS, stop_after=STEPS // 2)
    assert not equal(adapters(half), adapters(whole))
    again = qlora.train(True, folder, steps=STEPS, resume=True)
    assert equal(adapters(again), adapters(whole))


def test_adapters_are_trained_and_codes_stay(folder: Path) -> None:
    before = [m.weight.clone() for m in qlora.quantised_base(folder).modules() if isinstance(m, Linear4bit)]
    plain, biased = (qlora.train(with_prior, folder, steps=STEPS) for with_prior in (False, True))
    layers = [module for module in biased.model.modules() if isinstance(module, Linear4bit)]
    assert len(before) == 14
    assert all(torch.equal(layer.weight, codes) for layer, codes in zip(layers, before, strict=True))
    found = adapters(biased)
    assert sorted(unwrap_optimizer(biased.optimizer).prior_names) == sorted(found)
    assert len(found) == 2 * len(layers)
    assert all(not torch.equal(found[name], value) for name, value in adapters(plain).items() if "lora_B" in name)


def test_the_prior_is_of_the_checkpoints_before_they_were_quantised(folder: Path) -> None:
    prior, expected = Prior.open(folder / "prior"), tiny.expert_prior()
    for name, delta in expected.items():
        assert torch.equal(prior.load(name.removeprefix("model.")), delta.bfloat16())


def test_what_is_saved_loads_over_the_whole_base_and_has_learned(folder: Path) -> None:
    losses = [qlora.held_out_loss(qlora.train(with_prior, folder), folder) for with_prior in (False, True)]
    assert losses[1] < 0.8 * losses[0], losses
    loaded = PeftModel.from_pretrained(tiny.base_model(), folder / "adapter")
    assert tiny.held_out_loss(loaded) == losses[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_without_an_adapter_are_no_parameters_of_the_prior(bits: int) -> None:
    """Although the prior has deltas for them, and all parameters are passed."""
    model = text_model()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "layers" in name:
            bias = linear.bias is not None
            if bits == 4:
                quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=bias)
                quantised.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False)
            else:
                quantised = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
                quantised.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False)
            model.set_submodule(name, quantised.to("cpu"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    prior = lora_prior(model, deltas(which="proj.weight"))
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)
    figures = GradientBias(model.named_parameters(), prior, prior_scaling="absolute").apply_()
    assert len(figures.names) == 8
    optimizer = FusedDriftAdamW(model.named_parameters(), prior=prior)
    optimizer.step()
    assert len(optimizer.prior_names) == 8
