"""transformers' Qwen2 and Qwen2.5-VL, with a few hundred thousand parameters."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from .data import EOS, IMAGE, IMAGE_SIZE, PAD, TOKEN_ID, VISION_END, VISION_START
from .language import HEADS, HIDDEN, LANGUAGE, ROPE_THETA

TEXT_MODEL, MODEL = Qwen2ForCausalLM, Qwen2_5_VLForConditionalGeneration

PATCH_SIZE, MERGE_SIZE = 4, 2  # pixels; patches per token and direction
GRID = IMAGE_SIZE // PATCH_SIZE
IMAGE_PROMPT = (VISION_START, *[IMAGE] * (GRID // MERGE_SIZE) ** 2, VISION_END)

VISION = {
    "depth": 1,
    "fullatt_block_indexes": [0],
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_heads": HEADS,
    "in_channels": 1,
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": 1,
    "spatial_merge_size": MERGE_SIZE,
    "window_size": MERGE_SIZE * PATCH_SIZE,
    "out_hidden_size": HIDDEN,
}

# transformers 5 finds the images in a prompt by token types; transformers 4 by the vision tokens, and rejects the
# types.
_TAKES_TOKEN_TYPES = "mm_token_type_ids" in inspect.signature(MODEL.forward).parameters


def text_model(seed: int) -> Qwen2ForCausalLM:
    """A fresh text model."""
    torch.manual_seed(seed)
    return TEXT_MODEL(Qwen2Config(**LANGUAGE))


def multimodal_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh multimodal model."""
    thirds = [HIDDEN // HEADS // 6] * 3  # time, height and width share the rotary frequencies of a head
    rope = {"type": "mrope", "mrope_section": thirds, "rope_theta": ROPE_THETA}
    config = Qwen2_5_VLConfig(
        text_config={**LANGUAGE, "rope_scaling": rope},
        vision_config=VISION,
        tie_word_embeddings=False,
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
        image_token_id=TOKEN_ID[IMAGE],
        vision_start_token_id=TOKEN_ID[VISION_START],
        vision_end_token_id=TOKEN_ID[VISION_END],
    )
    torch.manual_seed(seed)
    return MODEL(config)


def image_inputs(images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """float32 `pixel_values` [patches, pixels per patch] and int64 `image_grid_thw` [images, 3]."""
    inputs = {"pixel_values": patches(images), "image_grid_thw": torch.tensor([[1, GRID, GRID]] * len(images))}
    if _TAKES_TOKEN_TYPES:
        inputs["mm_token_type_ids"] = (input_ids == TOKEN_ID[IMAGE]).int()
    return inputs


def patches(images: Tensor) -> Tensor:
    """Cut images [n, 8, 8] into rows for Qwen2.5-VL's vision tower: patches that it merges are adjacent."""
    groups = GRID // MERGE_SIZE
    grid = images.reshape(-1, groups, MERGE_SIZE, PATCH_SIZE, groups, MERGE_SIZE, PATCH_SIZE)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH_SIZE * PATCH_SIZE)
