"""transformers' Llama and LLaVA, with a few hundred thousand parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from .data import EOS, IMAGE, IMAGE_SIZE, PAD, TOKEN_ID
from .language import HEADS, HIDDEN, LANGUAGE

TEXT_MODEL, MODEL = LlamaForCausalLM, LlavaForConditionalGeneration

PATCH_SIZE = 4  # pixels
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_PROMPT = (IMAGE,) * PATCHES  # one token per patch


def text_model(seed: int) -> LlamaForCausalLM:
    """A fresh text model."""
    torch.manual_seed(seed)
    return TEXT_MODEL(LlamaConfig(**LANGUAGE))


def multimodal_model(seed: int) -> LlavaForConditionalGeneration:
    """A fresh multimodal model: a CLIP tower, a projector and a Llama."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_channels=1,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=HIDDEN,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**LANGUAGE),
        vision_config=vision,
        image_token_index=TOKEN_ID[IMAGE],
        image_seq_length=PATCHES,
        vision_feature_layer=-1,  # the tower has one layer
        tie_word_embeddings=False,
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    torch.manual_seed(seed)
    return MODEL(config)


def image_inputs(images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """float32 `pixel_values` [images, 1, 8, 8]; CLIP cuts them into patches itself."""
    return {"pixel_values": images[:, None]}
