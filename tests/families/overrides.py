"""Exceptions to the rules of shrink.py and experts.py: fields of single families, and experts of other types."""

from __future__ import annotations

from typing import Any

from .shrink import DROP

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_ssm": 64, "mamba_d_state": 16}
_INKLING = {"mlp_layer_types": ["dense", "sparse"]}
_QWEN4 = {"indexer_n_heads": 4, "indexer_kv_heads": 2, "indexer_head_dim": 8, "indexer_budget": 64}
_COMPASS = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}


def _text(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"text_config.{name}": value for name, value in fields.items()}


# Family -> fields of its config, by dotted path.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"text_config.vocab_size": 270_000},
    "bamba": _MAMBA,
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config.rope_parameters": _COMPASS},
    "cohere_compass_text": {"rope_parameters": _COMPASS},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "diffusion_gemma": _text({"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}),
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {
        "audio_config.adapter_input_size": 32,
        "text_config.num_key_value_heads": 4,
        "text_config.per_layer_config": DROP,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": DROP},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}, "vq_config.base_channels": 32},
    "falcon_h1": _MAMBA,
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": 0.0,
        "layer_types": DROP,
    },
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "hidden_size_per_layer_input": 0},
    "glm5_next": {"text_config.index_topk": 16, "text_config.num_key_value_heads": 4},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "inkling2": _text(_INKLING),
    "inkling2_loop": _text(_INKLING),
    "inkling2_loop_text": _INKLING,
    "inkling2_text": _INKLING,
    "janus": {"vq_config.base_channels": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1], "text_config.num_key_value_heads": 4},
    "mllama": {"text_config.num_hidden_layers": 4, "text_config.cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 48,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen2_5_omni": {"token2wav_config.bigvgan_config.upsample_initial_channel": 64},
    "qwen4_exp": _text(_QWEN4),
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16]},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
}

# Family -> model type of its expert.
EXPERTS = {"mllama": "llama", "chameleon": "llama", "idefics": "llama", "evolla": "llama", "phi4_multimodal": "phi3"}
EXPERTS |= {"paddleocr_vl": "ernie4_5", "janus": "llama", "emu3": "llama"}
EXPERTS |= dict.fromkeys(("qwen2_5_omni", "qwen2_5_omni_thinker"), "qwen2")
EXPERTS |= {"step3p7": "qwen3"}

# Family -> the multimodal model's numbers of the expert's layers, if they differ.
LAYERS: dict[str, dict[int, int]] = {"mllama": {0: 0, 1: 2, 2: 3}}

# Family -> fields of the expert's config, if they differ.
EXPERT_FIELDS: dict[str, dict[str, Any]] = {"mllama": {"num_hidden_layers": 3}}

# Family -> a file that transformers needs beside the weights.
EMPTY_FILES = {"qwen2_5_omni": "spk_dict.pt"}

# Family -> why no user setting binds the rest; shown if no cure was found.
NO_CURE = {
    "cosmos3_omni": "nothing to do: within a layer the base's file has other names than the expert's (`to_q` for "
    "`q_proj`), and a name map changes prefixes only",
    "lara_mini": "nothing to do: `in_proj` is one matrix on disk and four in memory, and a stored delta is not split "
    "into parts of unequal size",
    "minimax_m3_vl": "nothing to do: the shared experts are joined in the expert's file and apart, under another name, "
    "in the base's; only routed experts are paired across forms",
    "mistral_large4": "nothing to do: transformers renames most of a layer as it loads, by rules that this package "
    "lacks, and a name map changes prefixes only",
    "sarvam_moe": "nothing to do: `query_key_value` is one matrix on disk and three in memory, and a stored delta is "
    "not split into parts of unequal size",
}
