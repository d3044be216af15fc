"""transformers' own Llama and LLaVA, with a few hundred thousand parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from .data import EOS, IMAGE, IMAGE_SIZE, PAD, TOKEN_ID, TOKENS

MODEL = LlavaForConditionalGeneration

PATCH_SIZE = 4  # pixels
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_PROMPT = (IMAGE,) * PATCHES  # a token for each patch

HIDDEN, LAYERS, HEADS = 96, 4, 4


def _language() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )


def text_model(seed: int) -> LlamaForCausalLM:
    """A fresh text model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_language())


def multimodal_model(base: LlamaForCausalLM, seed: int) -> LlavaForConditionalGeneration:
    """`base` as the language model behind a fresh CLIP tower and projector."""
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
        text_config=_language(),
        vision_config=vision,
        image_token_index=TOKEN_ID[IMAGE],
        image_seq_length=PATCHES,
        vision_feature_layer=-1,  # the tower has one layer
        tie_word_embeddings=False,
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    torch.manual_seed(seed)
    model = MODEL(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def image_inputs(images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """float32 `pixel_values` [images, 1, 8, 8]; CLIP cuts them itself."""
    return {"pixel_values": images[:, None]}
