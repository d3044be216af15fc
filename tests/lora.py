"""A small model with LoRA adapters, and a prior for it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

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
    """With adapters on all projections; `started`: their B are not zero any more."""
    model = get_peft_model(
        text_model(seed), LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options))
    )
    for name, param in model.named_parameters() if started else ():
        if "lora_B" in name or "lora_embedding_A" in name:
            param.data.normal_(std=0.1)
    return model


def deltas(seed: int = 1, which: str = "", scale: float = 0.05) -> dict[str, Tensor]:
    """By the names of the plain model, of those that have `which` in them."""
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
