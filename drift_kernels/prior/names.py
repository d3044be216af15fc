"""Canonical tensor names: one name per weight of the language model, independent of its storage and of wrappers.

A canonical name is relative to the language model: `layers.3.self_attn.q_proj.weight`, `embed_tokens.weight`,
`norm.weight`, `lm_head.weight`. A name that no rule matches (of a vision tower or a projector) is unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

MODULES = ("attn", "mlp", "norm", "embed", "head")

# Presets that can be selected: a module, or a bundle of the authors. Their `norm` is the two norms of each layer;
# `norms` are all: also the final norm, those of queries and keys, and those around the MLP.
_LAYERNORM = re.compile(r"layers\.\d+\.(?:input|post_attention)_layernorm\.(?:weight|bias)")
_PRESETS = {
    "attn": ("attn",),
    "mlp": ("mlp",),
    "norm": ("layernorm",),
    "norms": ("norm",),
    "embed": ("embed",),
    "head": ("head",),
}
_BUNDLES = {"default": ("attn", "mlp"), "full": ("attn", "mlp", "norm", "embed", "head")}
PRESETS = (*_PRESETS, *_BUNDLES)

# Path components that wrappers add. They have no meaning, and can be anywhere in a name.
_WRAPPERS = (
    "module",  # DistributedDataParallel, DeepSpeed, and most other wrappers
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FSDP1
    "_checkpoint_wrapped_module",  # activation checkpointing
    r"base_model\.model",  # PEFT
)

# The prefixes of the language model by family: the part before `layers.`, `embed_tokens.`, `norm.` or `lm_head.`.
_PREFIXES = (
    "",  # canonical names; bare text models (Qwen2Model); lm_head almost everywhere
    "model.",  # text models; Qwen2-VL and Qwen2.5-VL as stored
    "language_model.",  # bare multimodal models (LlavaModel); `language_model.lm_head` as stored
    "model.language_model.",  # transformers >= 4.52 in memory; Qwen3-VL, Qwen3.5, Gemma 4
    "language_model.model.",  # LLaVA, InternVL, Mistral3, Gemma 3, PaliGemma, Mllama as stored; Llama 4; Kimi-VL
    "model.language_model.model.",  # this and the next: audio models as saved by transformers 5.10 to 5.23
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
# Lists of layers with another name.
_LAYER_LISTS = ("language_model.model.blocks.",)  # Kimi K2.5 as transformers 5 saves it

_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
_LANGUAGE_MODEL = re.compile(
    rf"(?:{'|'.join(re.escape(p) for p in _PREFIXES)})((?:layers\.\d+|embed_tokens|norm|lm_head)\..+)"
)
_LAYER_LIST = re.compile(rf"(?:{'|'.join(map(re.escape, _LAYER_LISTS))})(\d+\..+)")
_PARAMETER = re.compile(r"\.(?:weight|bias)$")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# Modules. Most families name the matrices of a layer by their function, some by their order.
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


def without_wrappers(name: str) -> str:
    """The name of a live parameter without what wrappers of its module add."""
    return _WRAPPER.sub("", name)


def canonical_name(name: str, name_map: Mapping[str, str] | None = None) -> str:
    """Return the canonical name of a stored tensor or live parameter; an unknown name is unchanged.

    `name_map` adds families that the table does not know: a map from prefixes to canonical prefixes, tried before the
    table, longest prefix first. `{"transformer.h.": "layers."}` maps `transformer.h.3.x` to `layers.3.x`.
    """
    name = without_wrappers(name)
    for prefix in sorted(name_map or (), key=len, reverse=True):
        if name.startswith(prefix):
            return name_map[prefix] + name[len(prefix) :]  # type: ignore[index]
    if match := _LAYER_LIST.fullmatch(name):
        return f"layers.{match[1]}"
    match = _LANGUAGE_MODEL.fullmatch(name)
    return match[1] if match else name


def layer_of(name: str) -> int | None:
    """The layer number of a canonical name; None if it has none (`embed_tokens.weight`)."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def with_layer(name: str, layer: int) -> str:
    """The same tensor in another layer: `with_layer("layers.3.mlp.up_proj.weight", 4)`."""
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a tensor in a layer")
    return f"layers.{layer}.{match[2]}"


def module_of(name: str) -> str:
    """The module of a canonical name: one of MODULES, or "other" (routers, vision towers).

    Everything that mixes tokens is "attn": attention, linear attention, Mamba, short convolutions. Everything that acts
    on single tokens, dense layers and experts, is "mlp".
    """
    module = _rule_of(name)
    return module if module in MODULES else "other"


def is_overlooked(name: str, ndim: int) -> bool:
    """Whether a tensor is a matrix in a layer that belongs to no module by mistake. Routers belong to none on purpose;
    tensors that accompany quantised weights are not weights."""
    of_a_weight = layer_of(name) is not None and not _OF_CODES.search(name)
    return ndim > 1 and of_a_weight and _rule_of(name) is None


def _rule_of(name: str) -> str | None:
    return next((module for module, rule in _MODULE_RULES if rule.fullmatch(name)), None)


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key that orders `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def parse_layers(text: str) -> frozenset[int]:
    """Parse numbers and ranges: `"0-3,8"` -> {0, 1, 2, 3, 8}. Raises ValueError for anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"layers must be numbers and ranges such as '0-3,8', got {text!r}")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def select_names(names: Iterable[str], modules: Sequence[str], layers: Iterable[int] | None = None) -> list[str]:
    """Return the canonical names that belong to `modules` and `layers`, in natural order.

    `modules`: entries of PRESETS, or `re:REGEX` searched in the canonical name (`selector`). `layers` only restricts
    names that have a layer; the others (embedding, final norm, head) depend on `modules` alone. Raises ValueError for
    an unknown module or an invalid regular expression.
    """
    selectors = [selector(module) for module in modules]
    wanted_layers = None if layers is None else frozenset(layers)

    def wanted(name: str) -> bool:
        if wanted_layers is not None and (layer := layer_of(name)) is not None and layer not in wanted_layers:
            return False
        return any(selected(name) for selected in selectors)

    return sorted(filter(wanted, names), key=natural_key)


def selector(entry: str) -> Callable[[str], bool]:
    """Return a test of canonical names for one of PRESETS, or for a match of the REGEX of `re:REGEX`.

    The authors' patterns end with the name of a module, as in `self_attn.q_proj$`. So a pattern that ends in `$` and
    contains neither "weight" nor "bias" is searched in `.layers.3.self_attn.q_proj` too. Raises ValueError for any
    other entry.
    """
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise ValueError(f"modules: {entry!r} is not a valid regular expression: {error}") from None
        if not entry.endswith("$") or "weight" in entry or "bias" in entry:
            return lambda name: pattern.search(name) is not None
        return lambda name: any(pattern.search(text) for text in (name, f".{_PARAMETER.sub('', name)}"))
    if entry not in PRESETS:
        raise ValueError(f"modules must be any of {', '.join(PRESETS)} or re:REGEX, got {entry!r}")
    kinds = {kind for preset in presets_in(entry) for kind in _PRESETS[preset]}
    return lambda name: module_of(name) in kinds or ("layernorm" in kinds and _LAYERNORM.fullmatch(name) is not None)


def presets_in(entry: str) -> tuple[str, ...]:
    """The presets of an entry: itself, or those of a bundle; none for `re:REGEX`."""
    return _BUNDLES.get(entry) or ((entry,) if entry in _PRESETS else ())


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names and the number of the rest, for messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
