"""A small model with LoRA adapters, and a prior for it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from drift_kernels import FusedDriftAdamW

VOCABULARY, LENGTH = 61, 7


def text_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config)


def adapted_model(seed: int = 0, started: bool = True, **options: Any) -> nn.Module:
    """A model with adapters on all projections; `started`: their B are no longer zero."""
    model = get_peft_model(
        text_model(seed), LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options))
    )
    for name, param in model.named_parameters() if started else ():
        if "lora_B" in name or "lora_embedding_A" in name:
            param.data.normal_(std=0.1)
    return model


def deltas(seed: int = 1, which: str = "", scale: float = 0.05) -> dict[str, Tensor]:
    """Deltas by the plain model's names, for names that contain `which`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(param.shape, generator=generator)
        for name, param in text_model().named_parameters()
        if which in name and not name.endswith("norm.weight")
    }


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    return model(input_ids=tokens, labels=tokens).loss


def train(model: nn.Module, optimizer: FusedDriftAdamW, begin: int, end: int) -> dict[str, Tensor]:
    for step in range(begin, end):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def zero_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
