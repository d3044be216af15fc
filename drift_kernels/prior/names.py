"""Canonical tensor names: one name for a weight of the language model, whoever stored it and whatever wraps it.

A canonical name is relative to the language model: `layers.3.self_attn.q_proj.weight`, `embed_tokens.weight`,
`norm.weight`, `lm_head.weight`. A name that no rule knows (a vision tower's, a projector's) stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

MODULES = ("attn", "mlp", "norm", "embed", "head")

# Path components that a wrapper adds; they carry no meaning and may stand anywhere in a name.
_WRAPPERS = (
    "module",  # DistributedDataParallel, DeepSpeed, and most other wrappers
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FSDP1
    "_checkpoint_wrapped_module",  # activation checkpointing
    r"base_model\.model",  # PEFT
)

# Where a family keeps its language model: what stands before `layers.`, `embed_tokens.`, `norm.` or `lm_head.`.
_PREFIXES = (
    "",  # canonical names; bare text models (Qwen2Model); lm_head almost everywhere
    "model.",  # text models; Qwen2-VL and Qwen2.5-VL as stored
    "language_model.",  # bare multimodal models (LlavaModel); `language_model.lm_head` as stored
    "model.language_model.",  # transformers >= 4.52 in memory; Qwen3-VL, Qwen3.5, Gemma 4
    "language_model.model.",  # LLaVA, InternVL, Mistral3, Gemma 3, PaliGemma, Mllama as stored; Llama 4; Kimi-VL
    "model.language_model.model.",  # audio models as transformers 5.10 to 5.23 saved them, and the next
    "language_model.model.model.",
    "language_model.model.encoder.",  # Qianfan-OCR as transformers 5 saves it
    "text_model.",  # bare Idefics2, Idefics3, SmolVLM; `text_model.lm_head` of Emu3 as stored
    "model.text_model.",  # Idefics2, Idefics3, SmolVLM; Emu3 in memory
    "text_model.model.",  # Emu3 as stored; Kosmos-2
    "thinker.",  # `thinker.lm_head` of Qwen2.5-Omni and Qwen3-Omni
    "thinker.model.",  # Qwen2.5-Omni and Qwen3-Omni as stored
    "thinker.model.language_model.",  # the same in memory
    "llm.",  # `llm.lm_head` of MiniCPM-V 2
    "llm.model.",  # MiniCPM-V 2
    "language.",  # `language.lm_head` of DeepSeek-VL2
    "language.model.",  # DeepSeek-VL2
    "gpt_neox.",  # GPT-NeoX, Pythia
    "backbone.",  # Mamba; Nemotron-H as stored
    "language_model.backbone.",  # Nemotron-H Omni as stored
    "vlm.language_model.",  # bare PI0
    "model.vlm.language_model.",  # PI0 in memory
    "paligemma_with_expert.paligemma.model.language_model.",  # PI0 as stored, and as transformers 5 saves it
    "paligemma_with_expert.paligemma.model.language_model.model.",
)
# Where layers are not called so.
_LAYER_LISTS = ("language_model.model.blocks.",)  # Kimi K2.5 as transformers 5 saves it

_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
_LANGUAGE_MODEL = re.compile(
    rf"(?:{'|'.join(re.escape(p) for p in _PREFIXES)})((?:layers\.\d+|embed_tokens|norm|lm_head)\..+)"
)
_LAYER_LIST = re.compile(rf"(?:{'|'.join(map(re.escape, _LAYER_LISTS))})(\d+\..+)")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# Modules. The matrices of a layer are called by what they do in most families, and by their order in some.
_PROJECTIONS = (
    r"\w*_proj\w*",
    r"[wW](?:qkv|kv|[qkvoi]|[123]|gate|q_[ab]|o_[ab])",
    r"dense\w*|query_key_value|c_attn|c_fc|fc[123]|input_linear|output_linear|linear_\w+|output_gate",
    r"\w*conv(?:_?1d)?",
)
_PROJECTION = rf"(?:{'|'.join(_PROJECTIONS)})"
_WEIGHT = rf"(?:.+\.)?{_PROJECTION}(?:\.linear|\.conv1d)?(?:\.(?:weight|bias))?"
_MIXERS = "self_attn|linear_attn|cross_attn|self_attention|attention|attn|temporal_block|mamba|conv"
_MLPS = r"mlp|mlps|feed_forward|ffn|block_sparse_moe|shared_mlp|moe|share_expert|experts|mlp_block"
_ROUTERS = r"gate|router|\w*_router|shared_expert_gate"
_OF_CODES = re.compile(r"scale|zero|_packed|_shape|absmax|quant_|q(?:weight|zeros)$|g_idx")
_MODULE_RULES = (
    ("embed", re.compile(r"embed_tokens\.weight")),
    ("head", re.compile(r"lm_head\.(?:weight|bias)")),
    ("norm", re.compile(r"(?:layers\.\d+\..*)?norm\.(?:weight|bias)")),
    ("router", re.compile(rf"layers\.\d+\.(?:.+\.)?(?:{_ROUTERS})\..+|layers\..+\.e_score_correction_bias")),
    ("mlp", re.compile(r"layers\.\d+\.(?:.+\.)?mixer\.(?:\w*experts\..+|(?:gate|up|down)_proj\.(?:weight|bias))")),
    ("attn", re.compile(rf"layers\.\d+\.(?:.+\.)?(?:{_MIXERS}|mixer)\.{_WEIGHT}")),
    ("mlp", re.compile(rf"layers\.\d+\.(?:(?:.+\.)?(?:{_MLPS})\.{_WEIGHT}|fc[12]\.(?:weight|bias))")),
)


def canonical_name(name: str, name_map: Mapping[str, str] | None = None) -> str:
    """Name of a stored tensor or of a live parameter -> canonical name; an unknown name stands for itself.

    `name_map` adds families that the table does not know: prefix -> canonical prefix, the longest matching
    prefix first, tried before the table. `{"transformer.h.": "layers."}` reads `transformer.h.3.x` as `layers.3.x`.
    """
    name = _WRAPPER.sub("", name)
    for prefix in sorted(name_map or (), key=len, reverse=True):
        if name.startswith(prefix):
            return name_map[prefix] + name[len(prefix) :]  # type: ignore[index]
    if match := _LAYER_LIST.fullmatch(name):
        return f"layers.{match[1]}"
    match = _LANGUAGE_MODEL.fullmatch(name)
    return match[1] if match else name


def layer_of(name: str) -> int | None:
    """The layer number of a canonical name, or None (`embed_tokens.weight`)."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def with_layer(name: str, layer: int) -> str:
    """The same tensor in another layer: `with_layer("layers.3.mlp.up_proj.weight", 4)`."""
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no layer")
    return f"layers.{layer}.{match[2]}"


def module_of(name: str) -> str:
    """The module of a canonical name: one of MODULES, or "other" (routers, vision towers).

    What mixes tokens is "attn": attention, linear attention, Mamba, short convolutions. What acts on each token, dense
    or of experts, is "mlp".
    """
    module = _rule_of(name)
    return module if module in MODULES else "other"


def is_overlooked(name: str, ndim: int) -> bool:
    """Whether a tensor is a matrix of a layer that no module claims. Routers belong to none on purpose, and what
    accompanies quantised weights is no weight."""
    of_a_weight = layer_of(name) is not None and not _OF_CODES.search(name)
    return ndim > 1 and of_a_weight and _rule_of(name) is None


def _rule_of(name: str) -> str | None:
    return next((module for module, rule in _MODULE_RULES if rule.fullmatch(name)), None)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def parse_layers(text: str) -> frozenset[int]:
    """`"0-3,8"` -> {0, 1, 2, 3, 8}. Raises ValueError on anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"layers must be numbers and ranges such as '0-3,8', got {text!r}")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def select_names(names: Iterable[str], modules: Sequence[str], layers: Iterable[int] | None = None) -> list[str]:
    """The canonical names that belong to `modules` and `layers`, in natural order.

    `modules`: entries of MODULES, or `re:REGEX` searched in the canonical name. `layers` restricts the names that
    have a layer and leaves the others (embedding, final norm, head) to `modules`. Raises ValueError on an unknown
    module or a broken regular expression.
    """
    presets, patterns = set(), []
    for module in modules:
        if module.startswith("re:"):
            try:
                patterns.append(re.compile(module[3:]))
            except re.error as error:
                raise ValueError(f"modules: {module!r} is not a regular expression: {error}") from None
        elif module in MODULES:
            presets.add(module)
        else:
            raise ValueError(f"modules must be among {', '.join(MODULES)} or re:REGEX, got {module!r}")
    wanted_layers = None if layers is None else frozenset(layers)

    def wanted(name: str) -> bool:
        if wanted_layers is not None and (layer := layer_of(name)) is not None and layer not in wanted_layers:
            return False
        return module_of(name) in presets or any(pattern.search(name) for pattern in patterns)

    return sorted(filter(wanted, names), key=natural_key)


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, and how many more there are: for messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
