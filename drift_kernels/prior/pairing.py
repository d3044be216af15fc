"""Which tensors of the checkpoints make up a prior: pairing by canonical name, checks, and warnings worth keeping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError, PriorError
from .files import Checkpoint, StoredTensor
from .names import (
    MODULES,
    canonical_name,
    is_overlooked,
    layer_of,
    module_of,
    natural_key,
    select_names,
    some,
    with_layer,
)

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config")
_CROSS_ATTENTION = re.compile(r"layers\.\d+\.cross_attn\.")
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)")


@dataclass(frozen=True)
class LanguageModel:
    """One checkpoint's tensors by canonical name. `layers` are its ordinary ones, without cross-attention layers."""

    checkpoint: Checkpoint
    tensors: dict[str, StoredTensor]
    layers: list[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint, name_map: Mapping[str, str] | None) -> LanguageModel:
        tensors: dict[str, StoredTensor] = {}
        for stored_name, tensor in checkpoint.tensors.items():
            name = canonical_name(stored_name, name_map)
            if name in tensors:
                raise CheckpointError(f"{checkpoint.folder}: two tensors have the canonical name {name}")
            tensors[name] = tensor
        crossing = {layer_of(name) for name in tensors if _CROSS_ATTENTION.match(name)}
        layers = {layer for name in tensors if (layer := layer_of(name)) is not None}
        return cls(checkpoint, tensors, sorted(layers - crossing))

    def numbered_like(self, base: LanguageModel) -> LanguageModel:
        """The same tensors under the base's layer numbers.

        Mllama inserts cross-attention layers between those of the text model, so that text layer 3 is its layer 4.
        Raises PriorError when the two have different numbers of ordinary layers.
        """
        if len(self.layers) != len(base.layers):
            raise PriorError(
                f"the checkpoints do not fit: {self.checkpoint.folder} has {len(self.layers)} layers, "
                f"{base.checkpoint.folder} has {len(base.layers)}"
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
    """One delta to be made: the tensors that it comes from, by role ("expert", "base" and maybe "reference").

    The shape is the base's; beyond `common` leading elements (a smaller vocabulary) the delta is zero.
    """

    name: str
    shape: tuple[int, ...]
    common: int
    sources: dict[str, StoredTensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def pair_up(
    checkpoints: Mapping[str, Checkpoint],
    modules: Sequence[str],
    layers: Iterable[int] | None,
    name_map: Mapping[str, str] | None,
) -> tuple[list[Pair], list[str]]:
    """The deltas to be made from the checkpoints (by role), in natural order, and the warnings to record.

    Layers are numbered as in the base. Raises PriorError when the checkpoints do not fit each other or share nothing
    that was asked for, and CheckpointError for tensors that cannot be subtracted (quantised ones).
    """
    base = LanguageModel.of(checkpoints["base"], name_map)
    models = {"base": base}
    for role in checkpoints.keys() - {"base"}:
        models[role] = LanguageModel.of(checkpoints[role], name_map).numbered_like(base)
    warnings = _config_warnings(checkpoints) + _vocabulary_warnings(models)
    if select_names([HEAD], modules, layers):
        _untie_heads(models, warnings)

    asked = {role: select_names(model.tensors, modules, layers) for role, model in models.items()}
    shared = set.intersection(*map(set, asked.values()))
    if not shared:
        samples = "; ".join(f"{role} has {some(asked[role]) or some(sorted(models[role].tensors))}" for role in asked)
        raise PriorError(f"the checkpoints share no tensor of modules {','.join(modules)}: {samples}")
    for role, names in asked.items():
        if alone := [name for name in names if name not in shared]:
            warnings.append(f"{len(alone)} tensors of the {role} have no counterpart: {some(alone)}")
    warnings += _left_out(models, asked, modules, layers)
    if any(map(_SINGLE_EXPERT.search, shared)):
        warnings.append("experts are stored one by one; a model that fuses them in memory binds their deltas joined")
    pairs = [
        _pair(name, {role: model.tensors[name] for role, model in models.items()})
        for name in sorted(shared, key=natural_key)
    ]
    return pairs, warnings


def _left_out(
    models: Mapping[str, LanguageModel],
    asked: Mapping[str, list[str]],
    modules: Sequence[str],
    layers: Iterable[int] | None,
) -> list[str]:
    """What a user may think is in the prior and is not."""
    chosen = set.intersection(*map(set, asked.values()))
    everywhere = set.intersection(*(set(model.tensors) for model in models.values()))
    ndims = {name: len(models["base"].tensors[name].shape) for name in everywhere - chosen}
    overlooked = select_names([name for name, ndim in ndims.items() if is_overlooked(name, ndim)], ["re:"], layers)
    warnings = [
        f"no {module} tensor is in all checkpoints under a name that is known"
        for module in modules
        if module in MODULES and module != "head" and not any(module_of(name) == module for name in chosen)
    ]
    if overlooked:
        warnings.append(
            f"{len(overlooked)} matrices in the layers belong to no module and are left out: {some(overlooked)}; "
            "re:REGEX in the modules takes them"
        )
    one_by_one = {role for role, names in asked.items() if any(map(_SINGLE_EXPERT.search, names))}
    fused = {role for role, names in asked.items() if any(map(_FUSED_EXPERTS.search, names))} - one_by_one
    if one_by_one and fused:
        warnings.append(
            f"experts are stored one by one in the {', '.join(sorted(one_by_one))} and fused in the "
            f"{', '.join(sorted(fused))}: they are not paired; save one of the models in the other's form first"
        )
    return warnings


def _pair(name: str, sources: dict[str, StoredTensor]) -> Pair:
    shape = sources["base"].shape
    for role, tensor in sources.items():
        if tensor.dtype not in _FLOATING:
            raise CheckpointError(f"{tensor.path}: {name} is stored as {tensor.dtype}: dequantise the checkpoint first")
        same_but_vocabulary = module_of(name) in ("embed", "head") and tensor.shape[1:] == shape[1:]
        if tensor.shape != shape and not same_but_vocabulary:
            raise PriorError(
                f"the checkpoints do not fit: {name} is {list(tensor.shape)} in the {role}, {list(shape)} in the base"
            )
    return Pair(name, shape, min(tensor.numel for tensor in sources.values()), sources)


def _untie_heads(models: Mapping[str, LanguageModel], warnings: list[str]) -> None:
    """A checkpoint without a head uses its embedding as head: give it that name, if the base has a head of its own."""
    tied = {role for role, model in models.items() if HEAD not in model.tensors and EMBED in model.tensors}
    if not tied:
        return
    if "base" in tied:
        warnings.append("the base's head is tied to its embedding: there is no head of its own to make a delta for")
        return
    for role in tied:
        models[role].tensors[HEAD] = models[role].tensors[EMBED]
        warnings.append(f"the {role}'s head is tied to its embedding, which is taken for its head")


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
    """The language model's part of a config, above the defaults of what encloses it."""
    for key in _TEXT_CONFIGS:
        if isinstance(config.get(key), Mapping):
            config = {**config, **config[key]}
    return config


def _rope_thetas(config: Mapping[str, Any]) -> set[float]:
    """Every rope_theta of a config: transformers 5 nests them in rope_parameters, one or one per kind of layer."""
    thetas = [config.get("rope_theta"), config.get("rope_local_base_freq")]
    nested = config.get("rope_parameters") or {}
    for parameters in (nested, *nested.values()):
        if isinstance(parameters, Mapping):
            thetas.append(parameters.get("rope_theta"))
    return {float(theta) for theta in thetas if theta is not None}


def _numbers(values: set[float]) -> str:
    return "/".join(f"{value:g}" for value in sorted(values))
