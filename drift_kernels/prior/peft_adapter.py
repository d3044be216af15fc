"""A PEFT adapter over a checkpoint: which weight each of its tensors changes, and how.

Supports LoRA with everything that PEFT merges into weights: rsLoRA, DoRA, ranks and alphas by pattern, biases,
embeddings, and modules saved whole. All else raises an error that names it: ignoring it would give a wrong delta.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .adapted import AdaptedBias, AdaptedWeight, LowRankChange
from .files import FLOATING, Source, TensorFile
from .names import canonical_name, some
from .reading import read_json
from .views import TransposedPart

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_PART = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(weight|bias))?")
_SAVED = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")
_HEAD = re.compile(r"lm_head\.(?:weight|bias)")  # a tied base does not store it, but an adapter may add it

# Options that are supported, or that do not affect merging; all others must not be set.
_OPTIONS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "bias"),
    *("lora_bias", "modules_to_save", "peft_type", "init_lora_weights", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping", "peft_version", "megatron_core", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # for initialisations, which are checked
}
# Initialisations that do not change the base. With the others (PiSSA, OLoRA, ...), the saved adapter is relative to a
# changed base.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


_MERGE = "merge it with PEFT first: model.merge_and_unload().save_pretrained(folder)"


def adapted(tensors: Mapping[str, Source], folder: Path) -> dict[str, Source]:
    """Return a checkpoint's tensors, with the adapter in `folder` merged as by PEFT's merge_and_unload.

    Raises CheckpointError if the adapter is damaged, not supported, or does not fit the tensors.
    """
    adapter = _Adapter(folder, read_json(folder / CONFIG_NAME))
    adapter.check_options()
    found, base = dict(tensors), _StoredNames(tensors)
    unknown: list[str] = []
    parts: dict[str, dict[str, Source]] = defaultdict(dict)
    for name, tensor in TensorFile.inspect(folder / WEIGHTS_NAME).tensors.items():
        if tensor.dtype not in FLOATING:
            raise CheckpointError(f"{folder}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
        if match := _PART.fullmatch(name):
            parts[match[1]][f"{match[2]}.bias" if match[3] == "bias" else match[2]] = tensor
            continue
        whole = canonical_name(_SAVED.sub("", name))
        if (of_base := base.find(whole)) or _HEAD.fullmatch(whole):
            found[of_base or whole] = tensor
        else:
            unknown.append(name)
    for module, pieces in parts.items():
        weight, bias = (base.find(canonical_name(f"{module}.{part}")) for part in ("weight", "bias"))
        if weight is None:
            unknown.append(module)
            continue
        scale = adapter.scale(module, pieces)
        found[weight] = AdaptedWeight(found[weight], adapter.change(module, pieces, found[weight].shape, scale))
        if change := pieces.get("lora_B.bias"):
            if bias is None or found[bias].shape != change.shape:
                raise CheckpointError(
                    f"{folder}: the adapter changes the bias of {module}, but the base has no such bias"
                )
            found[bias] = AdaptedBias(found[bias], change, scale)
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} modules or tensors of the adapter are not in the base: {some(sorted(unknown))}"
        )
    if all(found[name] is tensor for name, tensor in tensors.items()):
        raise CheckpointError(f"{folder}: the adapter changes no tensor of the base")
    return found


class _StoredNames:
    """The names of a checkpoint's tensors, looked up by canonical name. Outside the language model (a vision tower),
    names may differ by a leading `model.` between versions of transformers."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = {canonical_name(name): name for name in names}
        self._without_model = {name.removeprefix("model."): stored for name, stored in self._exact.items()}

    def find(self, canonical: str) -> str | None:
        return self._exact.get(canonical) or self._without_model.get(canonical.removeprefix("model."))


@dataclass(frozen=True)
class _Adapter:
    """An adapter's config, and what it means for a module."""

    folder: Path
    config: Mapping[str, Any]

    def check_options(self) -> None:
        kind, start = self.config.get("peft_type"), self.config.get("init_lora_weights", True)
        if kind != "LORA":
            raise CheckpointError(f"{self.folder}: expected an adapter with peft_type LORA, got {kind}: {_MERGE}")
        if others := sorted(name for name, value in self.config.items() if value and name not in _OPTIONS):
            raise CheckpointError(f"{self.folder}: a LoRA adapter with {', '.join(others)} is not supported: {_MERGE}")
        if start not in _INITIALISATIONS:
            raise CheckpointError(
                f"{self.folder}: the adapter was initialised with init_lora_weights={start!r}, which changes the base: "
                f"save it with PEFT's path_initial_model_for_weight_conversion, or {_MERGE}"
            )

    def scale(self, module: str, pieces: Mapping[str, Source]) -> float:
        """alpha / r, or alpha / sqrt(r); ranks and alphas may be given by patterns of module names."""
        name = module.removeprefix("base_model.model.")
        rank = _by_pattern(self.config.get("rank_pattern"), name, self.config.get("r"))
        alpha = _by_pattern(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha"))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.folder}: {CONFIG_NAME} gives {module} invalid rank {rank} or alpha {alpha}")
        found = {source.shape[:1] for part, source in pieces.items() if part.endswith("A")}
        found |= {source.shape[1:2] for part, source in pieces.items() if part.endswith("B")}
        if found != {(rank,)}:
            ranks = " and ".join(str(*shape) or "none" for shape in sorted(found))
            raise CheckpointError(f"{self.folder}: {module} has rank {ranks}, but {CONFIG_NAME} says {rank}")
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def change(self, module: str, pieces: Mapping[str, Source], shape: tuple[int, ...], scale: float) -> LowRankChange:
        """The change of a weight that is stored as [out, in], or as [in, out] (Conv1D, embeddings)."""
        embedding = "lora_embedding_A" in pieces
        a, b = (pieces.get(f"lora_{'embedding_' if embedding else ''}{part}") for part in "AB")
        magnitude = pieces.get("lora_magnitude_vector")
        if a is None or b is None or (magnitude is not None) != bool(self.config.get("use_dora")):
            raise CheckpointError(f"{self.folder}: damaged: {module} has only {', '.join(sorted(pieces))}")
        if not len(a.shape) == len(b.shape) == len(shape) == 2:
            raise CheckpointError(
                f"{self.folder}: the adapter of {module} is not for a matrix, which is not supported: {_MERGE}"
            )
        (rank, inputs), outputs = a.shape, b.shape[0]
        either = inputs != outputs or embedding or self.config.get("fan_in_fan_out")
        transposed = shape == (inputs, outputs) and bool(either)
        if not transposed and shape != (outputs, inputs):
            raise CheckpointError(
                f"{self.folder}: the adapter of {module} is for shape [{outputs}, {inputs}], but the base has "
                f"{list(shape)}"
            )
        if magnitude is not None and magnitude.numel != outputs:
            raise CheckpointError(
                f"{self.folder}: damaged: {module} has {magnitude.numel} magnitudes for {outputs} outputs"
            )
        if not transposed:
            return LowRankChange(b, a, scale, magnitude)
        left, right = TransposedPart(a, (inputs, rank), 0, inputs), TransposedPart(b, (rank, outputs), 0, rank)
        return LowRankChange(left, right, scale, magnitude, by_column=True)


def _by_pattern(patterns: Any, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, from the start of a name component."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
            return value
    return otherwise
