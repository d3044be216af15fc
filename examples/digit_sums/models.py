"""transformers' own Qwen2 and Qwen2.5-VL, with a few hundred thousand parameters."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from .data import EOS, IMAGE, MERGE_SIZE, PAD, PATCH_SIZE, TOKEN_ID, TOKENS, VISION_END, VISION_START

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
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def random_adapters(model: Qwen2_5_VLForConditionalGeneration, rank: int, seed: int) -> PeftModel:
    """The model with LoRA adapters on the language model's attention and MLP projections, as PEFT begins them."""
    torch.manual_seed(seed)
    projections = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=projections))
