"""Tiny models of many multimodal families, each with its text counterpart, made with transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

from drift_kernels.prior.files import StoredTensor, TensorFile

TRANSFORMERS_5 = int(hf.__version__.split(".")[0]) >= 5
TEXT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
MROPE = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}
CROSS_LAYERS = [1, 4]


@dataclass(frozen=True)
class Family:
    """A multimodal architecture, and the text architecture whose experts fit its language model."""

    model: str
    text: str
    config: Callable[[], hf.PretrainedConfig]

    def base(self) -> torch.nn.Module:
        return randomised(getattr(hf, self.model)(self.config()))

    def expert(self) -> torch.nn.Module:
        kind = getattr(hf, self.text)
        return randomised(kind(kind.config_class(**TEXT)))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Randomise every parameter: initialisation leaves norms and biases constant, so equal in expert and base."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def _wrapped(
    kind: str, text: str, vision: str, *, vision_options: Mapping[str, object] | None = None, **options: object
) -> hf.PretrainedConfig:
    """A config of the common form: a text config, a vision config, and little else."""
    return getattr(hf, kind)(
        text_config=getattr(hf, text)(**TEXT),
        vision_config=_vision_class(vision)(**VISION, **(vision_options or {})),
        image_token_index=3,
        image_token_id=3,
        tie_word_embeddings=False,
        **options,
    )


def _vision_class(name: str) -> type[hf.PretrainedConfig]:
    return hf.Idefics2Config().vision_config.__class__ if name == "Idefics2VisionConfig" else getattr(hf, name)


def _idefics2() -> hf.PretrainedConfig:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    return _wrapped("Idefics2Config", "MistralConfig", "Idefics2VisionConfig", perceiver_config=perceiver)


def _qwen_vl(kind: str, vision: Mapping[str, object], rope: Mapping[str, object] = MROPE) -> hf.PretrainedConfig:
    return getattr(hf, kind)(
        text_config={**TEXT, "rope_scaling": rope},
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 4, **vision},
        tie_word_embeddings=False,
        **TOKENS,
    )


def _qwen2_vl() -> hf.PretrainedConfig:
    return _qwen_vl("Qwen2VLConfig", {"embed_dim": 32, "mlp_ratio": 2})


def _qwen2_5_vl() -> hf.PretrainedConfig:
    vision = {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    return _qwen_vl("Qwen2_5_VLConfig", vision)


def _qwen3_vl() -> hf.PretrainedConfig:
    vision = {"out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0]
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return _qwen_vl("Qwen3VLConfig", vision, rope)


def _mllama() -> hf.PretrainedConfig:
    text = {**TEXT, "num_hidden_layers": TEXT["num_hidden_layers"] + len(CROSS_LAYERS)}
    text |= {"cross_attention_layers": CROSS_LAYERS, "rope_scaling": {"rope_type": "default"}}
    vision = {**VISION, "num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2]], "max_num_tiles": 2}
    return hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=3)


def _family(
    model: str, text: str, config: Callable[..., hf.PretrainedConfig], *arguments: str, **options: Any
) -> Family:
    return Family(f"{model}ForConditionalGeneration", f"{text}ForCausalLM", partial(config, *arguments, **options))


_CLIP = {"vision_options": {"projection_dim": 32}}
FAMILIES = {
    "qwen2_vl": _family("Qwen2VL", "Qwen2", _qwen2_vl),
    "qwen2_5_vl": _family("Qwen2_5_VL", "Qwen2", _qwen2_5_vl),
    "qwen3_vl": _family("Qwen3VL", "Qwen3", _qwen3_vl),
    "llava": _family("Llava", "Llama", _wrapped, "LlavaConfig", "LlamaConfig", "CLIPVisionConfig", **_CLIP),
    "llava_next": _family(
        "LlavaNext", "Mistral", _wrapped, "LlavaNextConfig", "MistralConfig", "CLIPVisionConfig", **_CLIP
    ),
    "llava_onevision": _family(
        "LlavaOnevision", "Qwen2", _wrapped, "LlavaOnevisionConfig", "Qwen2Config", "SiglipVisionConfig"
    ),
    "idefics2": _family("Idefics2", "Mistral", _idefics2),
    "idefics3": _family("Idefics3", "Llama", _wrapped, "Idefics3Config", "LlamaConfig", "Idefics3VisionConfig"),
    "smolvlm": _family("SmolVLM", "Llama", _wrapped, "SmolVLMConfig", "LlamaConfig", "SmolVLMVisionConfig"),
    "internvl": _family("InternVL", "Qwen2", _wrapped, "InternVLConfig", "Qwen2Config", "InternVLVisionConfig"),
    "gemma3": _family(
        "Gemma3", "Gemma3", _wrapped, "Gemma3Config", "Gemma3TextConfig", "SiglipVisionConfig", mm_tokens_per_image=4
    ),
    "mistral3": _family("Mistral3", "Mistral", _wrapped, "Mistral3Config", "MistralConfig", "PixtralVisionConfig"),
    "paligemma": _family("PaliGemma", "Gemma", _wrapped, "PaliGemmaConfig", "GemmaConfig", "SiglipVisionConfig"),
    "mllama": _family("Mllama", "Llama", _mllama),
}


def text_weights(*, layers: int = 3, vocabulary: int = 101, prefix: str = "model.") -> dict[str, Tensor]:
    """The float32 tensors of a small Qwen2-like language model with odd sizes, under stored names."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, 31), "norm": (31,)}
    for layer in range(layers):
        stem = f"layers.{layer}."
        shapes |= {f"{stem}self_attn.{p}_proj": (33, 31) for p in "qkv"} | {f"{stem}self_attn.o_proj": (31, 33)}
        shapes |= {f"{stem}mlp.{p}_proj": (63, 31) for p in ("gate", "up")} | {f"{stem}mlp.down_proj": (31, 63)}
        shapes |= {f"{stem}input_layernorm": (31,)}
    weights = {f"{prefix}{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"{prefix}layers.{n}.self_attn.q_proj.bias": torch.randn(33) for n in range(layers)}
    return weights


def tuned(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as after fine-tuning: each slightly changed."""
    return {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}


def write_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    """Write an ordinary checkpoint: one file, or several with an index, over which the tensors are dealt in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[shard::shards]}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a folder's files are, by their stored names."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in TensorFile.inspect(path).tensors.items()}


def flip_bit(folder: Path, tensor: str, byte: int = 0, bit: int = 0) -> None:
    """Flip a bit of a stored tensor in its file. By default the lowest of the first element's, if little-endian."""
    place = stored_tensors(folder)[tensor]
    with place.path.open("r+b") as file:
        file.seek(place.offset + byte)
        value = file.read(1)[0]
        file.seek(place.offset + byte)
        file.write(bytes([value ^ 1 << bit]))
