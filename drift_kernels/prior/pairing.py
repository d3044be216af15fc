"""Pairing the tensors of checkpoints for a prior by canonical name, with checks and warnings for the record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, PriorError
from .checkpoint import Checkpoint
from .encodings import check_encodings, marked_weights
from .files import Source
from .fusion import of_all_experts, of_one_expert
from .names import (
    canonical_name,
    is_overlooked,
    layer_of,
    module_of,
    natural_key,
    presets_in,
    select_names,
    selector,
    some,
    with_layer,
)
from .unfusing import check_experts, unfuse

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"

_TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config")
_CROSS_ATTENTION = re.compile(r"layers\.\d+\.cross_attn\.")
_FURTHER_LAYER = re.compile(r"layers\.\d+\.eh_proj\.")


@dataclass(frozen=True)
class LanguageModel:
    """The tensors of a checkpoint by canonical name, without multi-token prediction layers (which transformers does not
    load either). `layers` lists its ordinary layers, without cross-attention layers."""

    checkpoint: Checkpoint
    tensors: dict[str, Source]
    layers: list[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint, name_map: Mapping[str, str] | None) -> LanguageModel:
        tensors: dict[str, Source] = {}
        for stored_name, tensor in checkpoint.tensors.items():
            name = canonical_name(stored_name, name_map)
            if name in tensors:
                raise CheckpointError(f"{checkpoint.folder}: two tensors have the canonical name {name}")
            tensors[name] = tensor
        further = _further_layers(tensors, _text_config(checkpoint.config))
        tensors = {name: tensor for name, tensor in tensors.items() if layer_of(name) not in further}
        crossing = {layer_of(name) for name in tensors if _CROSS_ATTENTION.match(name)}
        layers = {layer for name in tensors if (layer := layer_of(name)) is not None}
        return cls(checkpoint, tensors, sorted(layers - crossing))

    def numbered_like(self, base: LanguageModel, asked: Iterable[int] | None) -> LanguageModel:
        """Return the same tensors with the base's layer numbers.

        Mllama inserts cross-attention layers between those of the text model, so that text layer 3 is its layer 4.
        Raises PriorError if the two have different numbers of ordinary layers, unless one only adds layers at the end
        and the requested layers are in both.
        """
        if len(self.layers) != len(base.layers):
            shorter, longer = sorted((self.layers, base.layers), key=len)
            goes_on = bool(shorter) and longer[: len(shorter)] == shorter
            if goes_on and asked is not None and set(asked) <= set(shorter):
                return self
            raise PriorError(
                f"the checkpoints do not fit: {self.checkpoint.folder} has {len(self.layers)} layers, "
                f"{base.checkpoint.folder} has {len(base.layers)}"
                + (f"; choose layers (--layers) from {shorter[0]}-{shorter[-1]}" if goes_on else "")
            )
        number = dict(zip(self.layers, base.layers, strict=True))
        if self.layers == base.layers:
            return self
        tensors = {}
        for name, tensor in self.tensors.items():
            layer = layer_of(name)
            if layer is None:
                tensors[name] = tensor
            elif layer in number:
                tensors[with_layer(name, number[layer])] = tensor
        return LanguageModel(self.checkpoint, tensors, base.layers)


@dataclass(frozen=True)
class Pair:
    """The tensors that a delta is computed from, by role ("expert", "base" and maybe "reference").

    A bias missing from one of the others counts as zero. The shape is the base's; beyond the first `common` elements (a
    smaller vocabulary) the delta is zero.
    """

    name: str
    shape: tuple[int, ...]
    common: int
    sources: dict[str, Source]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def pulled_to_zero(self) -> bool:
        """Whether it is a bias that the expert does not have."""
        return "expert" not in self.sources


@dataclass(frozen=True)
class Selection:
    """The tensors to include in a prior: `modules` and `layers` as in `select_names`, and whether to include biases."""

    modules: Sequence[str]
    layers: Sequence[int] | None = None
    include_bias: bool = True

    def of(self, names: Iterable[str]) -> list[str]:
        selected = select_names(names, self.modules, self.layers)
        return selected if self.include_bias else [name for name in selected if not name.endswith(".bias")]


def pair_up(
    checkpoints: Mapping[str, Checkpoint], selection: Selection, name_map: Mapping[str, str] | None
) -> tuple[list[Pair], list[str]]:
    """Return the deltas to compute from the checkpoints (by role), in natural order, and the warnings to record.

    Layers are numbered as in the base. Raises PriorError if the checkpoints do not fit each other or share none of the
    selected tensors, and CheckpointError for tensors that cannot be subtracted (quantised, or with unmerged adapters).
    """
    models = {role: LanguageModel.of(checkpoint, name_map) for role, checkpoint in checkpoints.items()}
    base = models["base"]
    models = {
        role: model if role == "base" else model.numbered_like(base, selection.layers) for role, model in models.items()
    }
    models = _with_single_experts(models)
    warnings = _config_warnings(checkpoints) + _vocabulary_warnings(models)
    if selection.of([HEAD]):
        _untie_heads(models, warnings)

    asked = {role: selection.of(model.tensors) for role, model in models.items()}
    everywhere = set().union(*asked.values())
    for role, model in models.items():
        found = set(selection.of(marked_weights(model.tensors)))
        check_encodings(role, model.checkpoint, model.tensors, everywhere, found)
    check_experts(asked)
    shared = set.intersection(*map(set, asked.values()))
    if not shared:
        samples = "; ".join(f"{role} has {some(asked[role]) or some(sorted(models[role].tensors))}" for role in asked)
        reasons = "".join(f"\n  {warning}" for warning in warnings)
        raise PriorError(
            f"the checkpoints share no tensor of modules {','.join(selection.modules)}: {samples}{reasons}"
        )
    lone = _lone_biases(models, set(asked["base"]) - shared)
    for role, names in asked.items():
        if alone := [name for name in names if name not in shared and name not in lone]:
            warnings.append(f"{len(alone)} tensors of the {role} have no counterpart: {some(alone)}")
    warnings += _left_out(models, asked, selection)
    if any(map(of_one_expert, shared)):
        warnings.append("experts are stored one by one; a model that fuses them in memory gets their deltas joined")
    pairs = [
        _pair(name, {role: model.tensors[name] for role, model in models.items() if name in model.tensors})
        for name in sorted(shared | lone, key=natural_key)
    ]
    if zeroed := [pair.name for pair in pairs if pair.pulled_to_zero]:
        warnings.append(f"{len(zeroed)} biases missing from the expert are pulled to zero: {some(zeroed)}")
    return pairs, warnings


def _with_single_experts(models: Mapping[str, LanguageModel]) -> dict[str, LanguageModel]:
    """The models, with fused experts split into single ones if another model stores them one by one."""
    singles = {name for model in models.values() for name in model.tensors if of_one_expert(name)}
    return {
        role: replace(model, tensors=unfuse(model.checkpoint, model.tensors, singles)) if singles else model
        for role, model in models.items()
    }


def _left_out(models: Mapping[str, LanguageModel], asked: Mapping[str, list[str]], selection: Selection) -> list[str]:
    """Warnings about tensors that a user may expect in the prior, but that are not in it."""
    chosen = set.intersection(*map(set, asked.values()))
    everywhere = set.intersection(*(set(model.tensors) for model in models.values()))
    ndims = {name: len(models["base"].tensors[name].shape) for name in everywhere - chosen}
    overlooked = [name for name, ndim in ndims.items() if is_overlooked(name, ndim)]
    overlooked = select_names(overlooked, ["re:"], selection.layers)
    presets = dict.fromkeys(preset for entry in selection.modules for preset in presets_in(entry))
    warnings = [
        f"no {preset} tensor with a known name is in all checkpoints"
        for preset in presets
        if preset != "head" and not any(map(selector(preset), chosen))
    ]
    if overlooked:
        warnings.append(
            f"{len(overlooked)} matrices in the layers belong to no module and are left out: {some(overlooked)}; "
            "add re:REGEX to the modules to include them"
        )
    one_by_one = {role for role, names in asked.items() if any(map(of_one_expert, names))}
    fused = {role for role, names in asked.items() if any(map(of_all_experts, names))} - one_by_one
    if one_by_one and fused:
        stacks = [name for role in sorted(fused) for name in asked[role] if of_all_experts(name)]
        warnings.append(
            f"experts are stored one by one in the {', '.join(sorted(one_by_one))} and fused in the "
            f"{', '.join(sorted(fused))}: they are not paired, because neither the family nor the sizes in its "
            f"config show whether they are transposed ({some(stacks)}); save one of the models in the form of the "
            "other first"
        )
    return warnings


def _further_layers(tensors: Iterable[str], config: Mapping[str, Any]) -> set[int | None]:
    """The multi-token prediction layers after the last ordinary one (GLM-4.5, DeepSeek-V3), found by the config's count
    or by a projection that no other layer has."""
    layers = {layer_of(name) for name in tensors} - {None}
    last, further = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    counted = range(last, last + further) if isinstance(last, int) and isinstance(further, int) else ()
    return layers & {*counted, *(layer_of(name) for name in tensors if _FURTHER_LAYER.match(name))}


def _lone_biases(models: Mapping[str, LanguageModel], candidates: set[str]) -> set[str]:
    """The biases of the base that the expert or reference lacks, though it has the weight: there the bias is zero.

    This matches the authors' code and what the expert computes. If both expert and reference lack a bias, there is no
    difference to make a delta from.
    """
    others = [model.tensors for role, model in models.items() if role != "base"]

    def zero_elsewhere(name: str) -> bool:
        weight = f"{name.removesuffix('.bias')}.weight"
        alone = len(others) > 1 and not any(name in tensors for tensors in others)
        return name.endswith(".bias") and all(weight in tensors for tensors in others) and not alone

    return set(filter(zero_elsewhere, candidates))


def _pair(name: str, sources: dict[str, Source]) -> Pair:
    shape = sources["base"].shape
    for role, tensor in sources.items():
        same_but_vocabulary = module_of(name) in ("embed", "head") and tensor.shape[1:] == shape[1:]
        if tensor.shape != shape and not same_but_vocabulary:
            raise PriorError(
                f"the checkpoints do not fit: {name} has shape {list(tensor.shape)} in the {role}, {list(shape)} in "
                "the base"
            )
    return Pair(name, shape, min(tensor.numel for tensor in sources.values()), sources)


def _untie_heads(models: Mapping[str, LanguageModel], warnings: list[str]) -> None:
    """A checkpoint without a head uses its embedding as head: add it under that name, if the base has its own head."""
    tied = {role for role, model in models.items() if HEAD not in model.tensors and EMBED in model.tensors}
    if not tied:
        return
    if "base" in tied:
        warnings.append("the base's head is tied to its embedding: there is no separate head to make a delta for")
        return
    for role in tied:
        models[role].tensors[HEAD] = models[role].tensors[EMBED]
        warnings.append(f"the {role}'s head is tied to its embedding, which is used as its head")


def _vocabulary_warnings(models: Mapping[str, LanguageModel]) -> list[str]:
    rows = {role: model.tensors[EMBED].shape[0] for role, model in models.items() if EMBED in model.tensors}
    if len(set(rows.values())) < 2:
        return []
    sizes = ", ".join(f"{role} {count}" for role, count in sorted(rows.items()))
    return [f"vocabularies differ ({sizes} rows): embed and head deltas cover the common rows and are zero elsewhere"]


def _config_warnings(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    thetas = {role: _rope_thetas(_text_config(checkpoint.config)) for role, checkpoint in checkpoints.items()}
    return [
        f"rope_theta differs: {_numbers(theta)} in the {role}, {_numbers(thetas['base'])} in the base"
        for role, theta in sorted(thetas.items())
        if theta and thetas["base"] and theta != thetas["base"]
    ]


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config, with missing values from the enclosing configs."""
    for key in _TEXT_CONFIGS:
        if isinstance(config.get(key), Mapping):
            config = {**config, **config[key]}
    return config


def _rope_thetas(config: Mapping[str, Any]) -> set[float]:
    """All rope_theta of a config: transformers 5 nests them in rope_parameters, a single one or one per layer type."""
    thetas = [config.get("rope_theta"), config.get("rope_local_base_freq")]
    nested = config.get("rope_parameters") or {}
    for parameters in (nested, *nested.values()):
        if isinstance(parameters, Mapping):
            thetas.append(parameters.get("rope_theta"))
    return {float(theta) for theta in thetas if theta is not None}


def _numbers(values: set[float]) -> str:
    return "/".join(f"{value:g}" for value in sorted(values))
