"""The text-only expert of a family, and the parameters that it shares with the multimodal model, found by structure.

This is the ground truth for the bindings, so it uses nothing from drift_kernels' name tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import transformers as hf
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .catalogue import Family
from .overrides import EXPERTS
from .shrink import HEAD_DIM

# Removing one of these suffixes from a text part's model type may give the type of its text-only relative.
_SUFFIXES = (
    r"_text(_model)?$",
    r"_text(_model)?$|_vl|_omni|_thinker|_audio",
    r"v(_moe)?_text$",
    r"_(vl|audio)_|_(text|vl)$",
)

_HEAD = re.compile(r"^(?:\w+\.)?(?:lm_head|embed_out)\.(weight|bias)$")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# Parts of a layer other than attention and MLP matrices, by a component of the name: routers, norms, position terms,
# and other mixers (convolutions, state spaces, hyper-connections, predictors of the keys to attend to).
_BESIDE = re.compile(
    r"(?:^|\.)(?:gate|\w*router\w*|wg|gate_network|classifier|shared_expert_gate|\w*conv\w*|A_log|D|\w*norm\w*|altup|laurel|"
    r"per_layer\w*|rel\w*|indexer|e_score\w*|expert_bias|input_gate|rotary\w*|\w*embed\w*|mamba\w*|\w*_hc|hc_\w*)"
    r"(?:\.|$)"
)


class NoExpertError(Exception):
    """There is no text-only model of this language model."""


@dataclass(frozen=True)
class Shared:
    """A parameter that both models have."""

    live: str  # its name in the multimodal model
    expert: str  # its name in the expert
    part: str  # "projection", "beside", "norm", "embed", "head" or "bias"


def experts_for(family: Family, base: nn.Module) -> Iterator[tuple[type[nn.Module], hf.PretrainedConfig]]:
    """Classes and configs of possible experts, most likely first. For a text-only family it is its own class. If
    neither the language model nor a relative has a text-only class, its bare text model is used."""
    config = base.config
    text = config.get_text_config(decoder=True)
    if not family.multimodal:
        yield getattr(hf, family.model), config
    elif family.name in EXPERTS:
        yield _as_kind(text, CONFIG_MAPPING[EXPERTS[family.name]])
    else:
        if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            yield MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text
        for name in dict.fromkeys(re.sub(suffix, "", text.model_type) for suffix in _SUFFIXES):
            kind = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401 (it has no get)
            if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in (type(text), type(config)):
                yield _as_kind(text, kind)
        bare = base.get_decoder()
        if isinstance(bare, hf.PreTrainedModel) and bare is not base and bare is not base.base_model:
            yield type(bare), bare.config


def _as_kind(text: hf.PretrainedConfig, kind: type[hf.PretrainedConfig]) -> tuple[type[nn.Module], hf.PretrainedConfig]:
    """A relative's class, and its config with those fields of the text part that it supports."""
    known = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {field: value for field, value in text.to_dict().items() if field in known}
    for one, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if one in known and other in text.to_dict():
            fields.setdefault(one, getattr(text, other))
    if "head_dim" in known:
        fields.setdefault("head_dim", HEAD_DIM)
    return MODEL_FOR_CAUSAL_LM_MAPPING[kind], kind(**fields)


def language_model_path(base: nn.Module, expert: nn.Module, layers: dict[int, int]) -> tuple[str, dict[str, str]]:
    """The path of the base's language model: the module with most of the expert's parameters, with equal shapes (the
    first, on ties); and the expert's names of these, relative to its inner model."""
    wanted = {_renumbered(n, layers): (n, tuple(p.shape)) for n, p in expert.base_model.named_parameters()}
    best: tuple[int, str, dict[str, str]] = 0, "", {}
    for path, module in base.named_modules():
        found = {
            name: wanted[name][0]
            for name, param in module.named_parameters(remove_duplicate=False)
            if name in wanted and _fits(wanted[name][1], tuple(param.shape), name)
        }
        if len(found) > best[0]:
            best = len(found), path, found
    if 2 * best[0] < len(wanted):
        raise NoExpertError(
            f"only {best[0]} of {len(wanted)} parameters of {type(expert).__name__} are found in the base"
        )
    return best[1], best[2]


def shared_parameters(base: nn.Module, expert: nn.Module, layers: dict[int, int]) -> tuple[str, list[Shared]]:
    """The path of the base's language model, and the parameters that it shares with the expert."""
    path, found = language_model_path(base, expert, layers)
    prefix, inner = f"{path}." if path else "", _inner_prefix(expert)
    live = dict(base.named_parameters())
    heads, expert_heads = _heads(base), _heads(expert)
    shared = [Shared(heads[k], expert_heads[k], "head") for k in sorted(heads.keys() & expert_heads.keys())]
    for name, theirs in found.items():
        if prefix + name in live and prefix + name not in heads.values():
            shared.append(Shared(prefix + name, inner + theirs, _part(name, live[prefix + name])))
    return path, shared


def _heads(model: nn.Module) -> dict[str, str]:
    """The names of the head's weight and bias, by suffix."""
    return {match[1]: name for name, _ in model.named_parameters() if (match := _HEAD.search(name))}


def _fits(theirs: tuple[int, ...], ours: tuple[int, ...], name: str) -> bool:
    """Whether the shapes are equal; for an embedding, the vocabularies may differ."""
    return theirs == ours or (len(ours) == 2 and theirs[1:] == ours[1:] and not _LAYER.search(name))


def _inner_prefix(expert: nn.Module) -> str:
    return next((f"{name}." for name, module in expert.named_modules() if module is expert.base_model and name), "")


def _renumbered(name: str, layers: dict[int, int]) -> str:
    match = _LAYER.search(name)
    if not match or not layers:
        return name
    return name[: match.start(1)] + str(layers[int(match[1])]) + name[match.end(1) :]


def _part(name: str, param: Tensor) -> str:
    if not _LAYER.search(name):
        return "embed" if param.ndim == 2 else "norm"
    if param.ndim >= 2:
        return "beside" if _BESIDE.search(name) else "projection"
    return "norm" if re.search(r"norm|ln_|_ln", name) else "bias"
