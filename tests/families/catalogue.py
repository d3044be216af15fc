"""The families listed in transformers' tables of auto classes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import transformers as hf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_MULTIMODAL = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "VISION_2_SEQ", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM")
_WHOLE_OMNI = {"qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration"}
_WHOLE_OMNI |= {"qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration"}
_SENSE = re.compile(r"vision|image|visual|audio|encoder|thinker|perceiver|speech|protein|backbone|video|vq")


@dataclass(frozen=True)
class Family:
    """A model class, by the model type of its config."""

    name: str
    model: str
    multimodal: bool

    @property
    def config_class(self) -> type[hf.PretrainedConfig]:
        return CONFIG_MAPPING[self.name]


def families() -> list[Family]:
    """The multimodal families, then the text-only ones, each in alphabetical order."""
    found: dict[str, Family] = {}
    for table in _MULTIMODAL:
        for name, model in _table(table).items():
            if (table != "SEQ_TO_SEQ_CAUSAL_LM" and table != "SPEECH_SEQ_2_SEQ") or _has_senses(name):
                found.setdefault(name, Family(name, model, True))
    for name, model in _WHOLE_OMNI.items():
        if hasattr(hf, model):
            found.setdefault(name, Family(name, model, True))
    for name, model in _table("CAUSAL_LM").items():
        found.setdefault(name, Family(name, model, _has_senses(name)))
    return sorted(found.values(), key=lambda family: (not family.multimodal, family.name))


def _table(name: str) -> dict[str, str]:
    table = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {})
    return {kind: model if isinstance(model, str) else model[0] for kind, model in table.items()}


def _has_senses(name: str) -> bool:
    """Whether the config has a part other than text. A config class without one may still be multimodal (Fuyu)."""
    kind = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401 (it has no get)
    return any(map(_SENSE.search, getattr(kind, "sub_configs", {}) or {}))
