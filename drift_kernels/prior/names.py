"""Canonical tensor names: one name for a weight of the language model, whoever stored it and whatever wraps it.

A canonical name is relative to the language model: `layers.3.self_attn.q_proj.weight`, `embed_tokens.weight`,
`norm.weight`, `lm_head.weight`. A name that no rule knows (a vision tower's, a projector's) stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

MODULES = ("attn", "mlp", "norm", "embed", "head")

# What may be selected by name: a module, or the authors' bundles. Their `norm` is the two norms of each layer; `norms`
# are all: the final norm, those of queries and keys, those around the MLP.
_LAYERNORM = re.compile(r"layers\.\d+\.(?:input|post_attention)_layernorm\.(?:weight|bias)")
_PRESETS = {
    "attn": ("attn",),
    "mlp": ("mlp",),
    "norm": ("layernorm",),
    "norms": ("norm",),
    "embed": ("embed",),
    "head": ("head",),
    "default": ("attn", "mlp"),
    "full": ("attn", "mlp", "layernorm", "embed", "head"),
}
PRESETS = tuple(_PRESETS)

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
    "text_model.",  # bare Idefics2, Idefics3, SmolVLM
    "model.text_model.",  # Idefics2, Idefics3, SmolVLM
    "thinker.",  # `thinker.lm_head` of Qwen2.5-Omni and Qwen3-Omni
    "thinker.model.",  # Qwen2.5-Omni and Qwen3-Omni as stored
    "thinker.model.language_model.",  # the same in memory
    "llm.",  # `llm.lm_head` of MiniCPM-V 2
    "llm.model.",  # MiniCPM-V 2
    "language.",  # `language.lm_head` of DeepSeek-VL2
    "language.model.",  # DeepSeek-VL2
)

_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
_LANGUAGE_MODEL = re.compile(
    rf"(?:{'|'.join(re.escape(p) for p in _PREFIXES)})((?:layers\.\d+|embed_tokens|norm|lm_head)\..+)"
)
_PARAMETER = re.compile(r"\.(?:weight|bias)$")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_PROJECTION = r"(?:\w*_proj\w*|wqkv|wo|w[123])(?:\.(?:weight|bias))?"
_MODULE_RULES = (
    ("embed", re.compile(r"embed_tokens\.weight")),
    ("head", re.compile(r"lm_head\.(?:weight|bias)")),
    ("norm", re.compile(r"(?:layers\.\d+\..*)?norm\.(?:weight|bias)")),
    ("attn", re.compile(rf"layers\.\d+\.(?:self_attn|linear_attn|cross_attn|attention|attn)\.{_PROJECTION}")),
    ("mlp", re.compile(rf"layers\.\d+\.(?:mlp|feed_forward|block_sparse_moe)\.(?:.+\.)?{_PROJECTION}")),
)


def without_wrappers(name: str) -> str:
    """A live parameter's name without what wrappers of its module add."""
    return _WRAPPER.sub("", name)


def canonical_name(name: str, name_map: Mapping[str, str] | None = None) -> str:
    """Name of a stored tensor or of a live parameter -> canonical name; an unknown name stands for itself.

    `name_map` adds families that the table does not know: prefix -> canonical prefix, the longest matching
    prefix first, tried before the table. `{"transformer.h.": "layers."}` reads `transformer.h.3.x` as `layers.3.x`.
    """
    name = without_wrappers(name)
    for prefix in sorted(name_map or (), key=len, reverse=True):
        if name.startswith(prefix):
            return name_map[prefix] + name[len(prefix) :]  # type: ignore[index]
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
    """The module of a canonical name: one of MODULES, or "other" (routers, vision towers)."""
    return next((module for module, rule in _MODULE_RULES if rule.fullmatch(name)), "other")


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

    `modules`: entries of PRESETS, or `re:REGEX` searched in the canonical name (`selector`). `layers` restricts the
    names that have a layer and leaves the others (embedding, final norm, head) to `modules`. Raises ValueError on an
    unknown module or a broken regular expression.
    """
    selectors = [selector(module) for module in modules]
    wanted_layers = None if layers is None else frozenset(layers)

    def wanted(name: str) -> bool:
        if wanted_layers is not None and (layer := layer_of(name)) is not None and layer not in wanted_layers:
            return False
        return any(selected(name) for selected in selectors)

    return sorted(filter(wanted, names), key=natural_key)


def selector(entry: str) -> Callable[[str], bool]:
    """Whether a canonical name belongs to one of PRESETS, or holds what the REGEX of `re:REGEX` finds.

    The authors' patterns end with a module's name, as in `self_attn.q_proj$`: one that ends in `$`, and speaks of
    neither weight nor bias, is searched in `.layers.3.self_attn.q_proj` too. Raises ValueError for anything else.
    """
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise ValueError(f"modules: {entry!r} is not a regular expression: {error}") from None
        if not entry.endswith("$") or "weight" in entry or "bias" in entry:
            return lambda name: pattern.search(name) is not None
        return lambda name: any(pattern.search(text) for text in (name, f".{_PARAMETER.sub('', name)}"))
    if entry not in _PRESETS:
        raise ValueError(f"modules must be among {', '.join(PRESETS)} or re:REGEX, got {entry!r}")
    kinds = _PRESETS[entry]
    return lambda name: module_of(name) in kinds or ("layernorm" in kinds and _LAYERNORM.fullmatch(name) is not None)


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, and how many more there are: for messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
