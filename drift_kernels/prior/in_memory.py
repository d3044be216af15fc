"""The names and shapes that the parameters of a checkpoint have in memory, once it is loaded."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint

NamedParameters = list[tuple[str, Tensor]]


def live_parameters(checkpoint: Checkpoint) -> tuple[NamedParameters, str]:
    """Return the parameters of a checkpoint's model, on the meta device, and a line that says whose names these are.

    They are those of the transformers class in config.json. Without transformers, or if it does not have the class or
    cannot create it, they are the tensors on disk, and the line gives the reason.
    """
    try:
        model, kind = meta_model(checkpoint.folder)
        return list(model.named_parameters()), f"by the names of {kind}"
    except UnknownModelError as error:
        on_disk = [
            (name, torch.empty(t.shape, dtype=torch.float32, device="meta")) for name, t in checkpoint.tensors.items()
        ]
        return on_disk, f"by the names on disk, because {error}: they may differ from those in memory"


class UnknownModelError(Exception):
    pass


def meta_model(source: str | os.PathLike[str], revision: str | None = None) -> tuple[nn.Module, str]:
    """Create the model of a config.json, its folder, or a Hub id, on the meta device, without weights.

    Returns the model, and a line that describes it. Raises UnknownModelError without transformers, or if it does not
    have the class or cannot create it.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UnknownModelError("transformers is not installed")
    import transformers

    try:
        found = transformers.PretrainedConfig.get_config_dict(source, revision=revision)[0]
    except Exception as error:  # transformers and the Hub's client raise many types of errors
        raise UnknownModelError(f"config.json cannot be read ({_first_line(error)})") from error
    # For some families, transformers 4.57 writes them to text_config.
    architectures = found.get("architectures") or (found.get("text_config") or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UnknownModelError("config.json has no architecture")
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        raise UnknownModelError(f"transformers {transformers.__version__} has no {architectures[0]}")
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            model = kind(config)
        model.tie_weights()
    except Exception as error:  # the model's code may raise any error for an unsuitable config
        raise UnknownModelError(f"{kind.__name__} cannot be created from config.json ({_first_line(error)})") from error
    return model, f"{kind.__name__} in memory (transformers {transformers.__version__})"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def linear_weights(source: str | os.PathLike[str], revision: str | None = None) -> dict[str, Tensor]:
    """The weights of a model's linear layers (`meta_model`), by their names in memory. Raises CheckpointError if there
    is no such model."""
    try:
        model, _ = meta_model(source, revision)
    except UnknownModelError as error:
        raise CheckpointError(f"{source}: cannot create a transformers model from its config.json: {error}") from error
    return {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
