"""Tiny configs: a family's default config with every size reduced, by the names of the fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers as hf

Json = dict[str, Any]

WIDTH, HEAD_DIM, HEADS, KV_HEADS, VOCABULARY, EXPERTS = 32, 8, 4, 2, 128, 4

# Values of integer fields: the first rule whose pattern matches the field's name.
_SIZES = [
    (r"^(num_)?(hidden_layers|layers|layer|depths?)$|^n_layers?$|_(layers|depth)$|^num_layers|^num_.*_blocks$", 2),
    (r"layer_idx|first_k_dense|num_dense_layers|num_kv_shared|n_mtp|num_nextn", 1),
    (r"key_value_heads|kv_heads|query_groups|num_kv|multi_query_group", KV_HEADS),
    (r"head_dim|head_size|headdim|kv_channels|^(key|value|query)_dim$|d_head|dim_head|head_width", HEAD_DIM),
    (r"heads$|n_head$|num_head$|_head_num$", HEADS),
    (r"experts_per_tok|moe_k$|top_k|topk$|experts_topk|num_selected|moe_topk|num_active", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared", 1),
    (r"num_(local_)?experts$|n_routed_experts|num_.*experts$|n_experts|moe_num_experts|expert_num$", EXPERTS),
    (r"vocab_size$|^vocab_size|vocab_size_per", VOCABULARY),
    (r"intermediate|ffn|n_inner|mlp_dim|mlp_hidden|feed_forward|inner_dim|d_ff|ffw|expansion_dim", 48),
    (r"_rank$|^rank|lora_r$", 16),
    (r"state_size|d_state|ssm_state|n_groups|mamba_d_conv|conv_kernel|d_conv", None),
    (r"position_embeddings$|max_.*positions?$|seq_len|seq_length|n_positions|n_ctx", 64),
    (r"sliding_window|window_size$|chunk_size|attention_window|local_window", 8),
    (r"^image_size$|_image_size$", None),
    (
        r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|^dim$|^width$|embd|_dims?$|projector_.*dim",
        WIDTH,
    ),
]
_TOKEN = re.compile(r"(token_id|token_index|_id|_index)$")
_INDEX_LIST = re.compile(r"layers$|ind(ex|ic)es$|_idx$|_layer$")
_KINDS = re.compile(r"layer_types|layers_block_type|layers?_(type|pattern)|hybrid")
_MROPE_SECTION = [2, 1, 1]  # pairs of a head's elements rotated by time, height and width

# Not sizes: output descriptions, and generation settings, which are rejected in a config if they are not the default.
_LEFT_OUT = re.compile(
    r"^(id2label|label2id|transformers_version|architectures|dtype|torch_dtype|_name_or_path|top_k|top_p|temperature|"
    r"max_length|min_length|num_beams\w*|num_return_sequences|no_repeat_ngram_size|encoder_no_repeat_ngram_size)$"
)
# transformers 4 needs a rope for these and has no default.
_MULTIMODAL_ROPE = re.compile(r"(vl|omni|glm4v|mllama)\w*_text")


def tiny(kind: type[hf.PretrainedConfig], overrides: Mapping[str, Any] | None = None) -> hf.PretrainedConfig:
    """A tiny config. `overrides` are fields by dotted path, such as `vision_config.depth`; DROP keeps the default."""
    fields = shrunk(_fields(kind))
    for path, value in (overrides or {}).items():
        *parents, last = path.split(".")
        inner = fields
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is DROP:
            inner.pop(last, None)
        else:
            inner[last] = value
    return kind(**fields)


DROP = object()


def _fields(kind: type[hf.PretrainedConfig]) -> Json:
    config = kind()
    fields = config.to_dict()
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if fields.get(name) is None and inner is not hf.AutoConfig:
            fields[name] = inner().to_dict()
    return fields


def shrunk(fields: Json) -> Json:
    """The reduced fields of a config and its subconfigs. Lists with one entry per layer keep one layer of each kind."""
    layers, kept = _kept_layers(fields)
    result: Json = {}
    for name, value in fields.items():
        if _LEFT_OUT.search(name):
            continue
        if name == "per_layer_config" and value:
            numbers = {n: kept.index(int(n)) for n in value if int(n) in kept}
            result[name] = {str(numbers[n]): shrunk(dict(value[n])) for n in numbers}
        elif isinstance(value, Mapping):
            result[name] = shrunk(dict(value)) if "model_type" in value or name.endswith("config") else _mapping(value)
        elif isinstance(value, (list, tuple)):
            result[name] = _list(name, list(value), layers, kept)
        elif name == "rope_scaling" and value is None and _MULTIMODAL_ROPE.search(fields.get("model_type", "")):
            result[name] = {"rope_type": "default", "mrope_section": _MROPE_SECTION}
        elif name == "head_dim":
            result[name] = HEAD_DIM
        elif isinstance(value, bool) or not isinstance(value, int):
            result[name] = value
        else:
            result[name] = _number(name, value)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers"):
        if name in result and layers == fields[name]:
            result[name] = len(kept)
    return result


def _kept_layers(fields: Json) -> tuple[int, list[int]]:
    """The number of layers, and the first layer of each kind, at least two."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    layers = next((fields[name] for name in names if isinstance(fields.get(name), int)), 0)
    lists = [v for k, v in fields.items() if _KINDS.search(k) and isinstance(v, (list, tuple)) and len(v) == layers]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * layers
    first = sorted({kinds.index(kind) for kind in kinds})[:4]
    rest = [n for n in range(layers) if n not in first]
    return layers, sorted(first + rest[: max(0, 2 - len(first))])


def _list(name: str, value: list[Any], layers: int, kept: list[int]) -> list[Any]:
    numbers = bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if layers and len(value) == layers and not (numbers and value == list(range(layers))):
        value = [value[n] for n in kept]
        return [_number(name, v) if isinstance(v, int) and v > 8 else v for v in value]
    if numbers and _INDEX_LIST.search(name):
        return [v if v < 0 else 1 for v in value][:1]
    if numbers and not _TOKEN.search(name):
        return [_number(name, v) for v in value]
    return value


def _mapping(value: Mapping[str, Any]) -> Json:
    """Reduce rope parameters, whose lists have one entry per pair of a head's elements."""
    result = dict(value)
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            result[key] = _mapping(inner)
        elif key == "mrope_section":
            result[key] = _MROPE_SECTION
        elif key in ("long_factor", "short_factor"):
            result[key] = [1.0] * (HEAD_DIM // 2)
    return result


def _number(name: str, value: int) -> int:
    if _TOKEN.search(name):
        return value if value < VOCABULARY else 100 + sum(map(ord, name)) % 28
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return value if size is None else min(value, size)
    return value
