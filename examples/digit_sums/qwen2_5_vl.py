"""transformers' own Qwen2 and Qwen2.5-VL, with a few hundred thousand parameters."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from .data import EOS, IMAGE, IMAGE_SIZE, PAD, TOKEN_ID, TOKENS, VISION_END, VISION_START

MODEL = Qwen2_5_VLForConditionalGeneration

PATCH_SIZE, MERGE_SIZE = 4, 2  # pixels, patches that become one token
GRID = IMAGE_SIZE // PATCH_SIZE
IMAGE_PROMPT = (VISION_START, *[IMAGE] * (GRID // MERGE_SIZE) ** 2, VISION_END)

HIDDEN, LAYERS, HEADS = 96, 4, 4
ROPE_THETA = 10_000.0

LANGUAGE = {
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,  # the two classes have different defaults
    "rope_theta": ROPE_THETA,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": TOKEN_ID[EOS],
    "pad_token_id": TOKEN_ID[PAD],
}
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

# transformers 5 finds the images of a prompt by token types, transformers 4 by the vision tokens; it rejects the types.
_TAKES_TOKEN_TYPES = "mm_token_type_ids" in inspect.signature(MODEL.forward).parameters


def text_model(seed: int) -> Qwen2ForCausalLM:
    """A fresh text model."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**LANGUAGE))


def multimodal_model(base: Qwen2ForCausalLM, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """`base` as the language model behind a fresh vision tower."""
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
    model = MODEL(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def image_inputs(images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """float32 `pixel_values` [patches, pixels of a patch] and int64 `image_grid_thw` [images, 3]."""
    inputs = {"pixel_values": patches(images), "image_grid_thw": torch.tensor([[1, GRID, GRID]] * len(images))}
    if _TAKES_TOKEN_TYPES:
        inputs["mm_token_type_ids"] = (input_ids == TOKEN_ID[IMAGE]).int()
    return inputs


def patches(images: Tensor) -> Tensor:
    """Cut images [n, 8, 8] into the rows that Qwen2.5-VL's vision tower takes: patches that it merges lie together."""
    groups = GRID // MERGE_SIZE
    grid = images.reshape(-1, groups, MERGE_SIZE, PATCH_SIZE, groups, MERGE_SIZE, PATCH_SIZE)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH_SIZE * PATCH_SIZE)
