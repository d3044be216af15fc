"""The text-only expert of a family, and which of its parameters are which of the multimodal model's, found by structure.

This is the truth that bindings are compared with, so it takes nothing from drift_kernels' tables of names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import transformers as hf
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .catalogue import Family
from .overrides import EXPERTS

# Text parts whose config has no class of its own in AutoModelForCausalLM: the first of these names that has one.
_SUFFIXES = (r"_text(_model)?$", r"_text(_model)?$|_vl|_omni|_thinker|_audio", r"_text$|v$|_vl|v_text$")

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# What a layer holds beside attention and MLP matrices: routers, convolutions and recurrences, norms, position terms.
_BESIDE = re.compile(
    r"(?:^|\.)(?:gate|router\w*|wg|gate_network|classifier|conv\w*|conv1d|A_log|D|\w*norm\w*|\w*layernorm\w*|altup|laurel|"
    r"per_layer\w*|rel\w*|indexer|e_score\w*|expert_bias|input_gate|rotary\w*|embed\w*|\w*embedding\w*)"
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


def expert_for(family: Family, config: hf.PretrainedConfig) -> tuple[type[nn.Module], hf.PretrainedConfig]:
    """The expert's class and config: of a text-only family, its own. Raises NoExpertError."""
    if not family.multimodal:
        return getattr(hf, family.model), config
    text = config.get_text_config(decoder=True)
    if family.name in EXPERTS:
        kind = CONFIG_MAPPING[EXPERTS[family.name]]
    elif type(text) in MODEL_FOR_CAUSAL_LM_MAPPING and text is not config:
        kind = type(text)
    else:
        kind = _relative(text.model_type, text is config)
    if kind is None:
        raise NoExpertError(f"no text-only class for the language model {text.model_type}")
    if kind is not type(text):
        theirs = text.to_dict()
        known = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        text = kind(**{field: value for field, value in theirs.items() if field in known})
    return MODEL_FOR_CAUSAL_LM_MAPPING[kind], text


def _relative(model_type: str, itself: bool) -> type[hf.PretrainedConfig] | None:
    for suffix in _SUFFIXES:
        name = re.sub(suffix, "", model_type)
        if name in CONFIG_MAPPING and CONFIG_MAPPING[name] in MODEL_FOR_CAUSAL_LM_MAPPING:
            if not (itself and name == model_type):
                return CONFIG_MAPPING[name]
    return None


def language_model_path(base: nn.Module, expert: nn.Module, layers: dict[int, int]) -> tuple[str, dict[str, str]]:
    """Where the base keeps its language model: the module under which most of the expert's parameters are found, with
    equal shapes; and the expert's names (below its inner model) of them. The first of several such modules counts."""
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
    """The path of the base's language model, and the parameters that it has in common with the expert."""
    path, found = language_model_path(base, expert, layers)
    prefix, inner = f"{path}." if path else "", _inner_prefix(expert)
    live = dict(base.named_parameters())
    shared = []
    for name, theirs in found.items():
        if prefix + name in live:
            shared.append(Shared(prefix + name, inner + theirs, _part(name, live[prefix + name])))
    known = {pair.live for pair in shared}
    heads = [_named(model, model.get_output_embeddings()) for model in (base, expert)]
    if all(heads) and heads[0] not in known:
        shared.append(Shared(heads[0], heads[1], "head"))
    return path, shared


def _fits(theirs: tuple[int, ...], ours: tuple[int, ...], name: str) -> bool:
    """Equal shapes; of an embedding, maybe other vocabularies."""
    return theirs == ours or (len(ours) == 2 and theirs[1:] == ours[1:] and not _LAYER.search(name))


def _named(model: nn.Module, module: nn.Module | None) -> str | None:
    weight = getattr(module, "weight", None)
    return next((name for name, param in model.named_parameters() if param is weight), None)


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
