"""The model families: each has a text model, and a multimodal model around it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from . import llava, qwen2_5_vl


class Family(Protocol):
    """A module that makes the models of a family."""

    TEXT_MODEL: type[PreTrainedModel]
    MODEL: type[PreTrainedModel]  # the multimodal class
    IMAGE_PROMPT: tuple[str, ...]  # the tokens that stand for an image

    def text_model(self, seed: int) -> PreTrainedModel:
        """A fresh text model."""

    def multimodal_model(self, seed: int) -> PreTrainedModel:
        """A fresh multimodal model."""

    def image_inputs(self, images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The model's inputs besides tokens, for images [n, 8, 8] in the order of a batch."""


FAMILIES: dict[str, Family] = {"qwen2_5_vl": qwen2_5_vl, "llava": llava}


def with_language_model(family: Family, base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """`base` as the language model behind a fresh vision tower."""
    model = family.multimodal_model(seed)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model
