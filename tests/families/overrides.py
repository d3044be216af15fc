"""What the rules of shrink.py and experts.py do not say: fields of single families, and experts of another model type."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {
    "mllama": {"text_config.num_hidden_layers": 4, "text_config.cross_attention_layers": [1]},
}

# Family -> model type of its expert.
EXPERTS = {"mllama": "llama"}

# Family -> the expert's layers as the multimodal model numbers them, where they differ.
LAYERS: dict[str, dict[int, int]] = {"mllama": {0: 0, 1: 2, 2: 3}}

# Fields of the expert's config, where they differ.
EXPERT_FIELDS: dict[str, dict[str, Any]] = {"mllama": {"num_hidden_layers": 3}}
