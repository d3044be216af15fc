"""What a model will hold in memory: the names and shapes of a checkpoint's parameters once it is loaded."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint

NamedParameters = list[tuple[str, Tensor]]


def live_parameters(checkpoint: Checkpoint) -> tuple[NamedParameters, str]:
    """The parameters of the model of a checkpoint, on the meta device, and a line that says whose names these are.

    They are those of the class of transformers that config.json names. Without transformers, or for a class that it
    does not have or cannot make, they are the tensors on disk, and the line says why.
    """
    try:
        model, kind = meta_model(checkpoint.folder)
        return list(model.named_parameters()), f"by the names of {kind}"
    except UnknownModelError as error:
        on_disk = [
            (name, torch.empty(t.shape, dtype=torch.float32, device="meta")) for name, t in checkpoint.tensors.items()
        ]
        return on_disk, f"by the names on disk, since {error}: in memory the model may hold others"


class UnknownModelError(Exception):
    pass


def meta_model(source: str | os.PathLike[str], revision: str | None = None) -> tuple[nn.Module, str]:
    """The model of the config.json in a folder, of the file itself, or of a Hub id, on the meta device: shapes and no
    weights. And a line that says what it is.

    Raises UnknownModelError without transformers, and for a class that it does not have or cannot make.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UnknownModelError("transformers is not installed")
    import transformers

    try:
        found = transformers.PretrainedConfig.get_config_dict(source, revision=revision)[0]
    except Exception as error:  # of transformers and of the Hub's client, whatever they find
        raise UnknownModelError(f"config.json cannot be read ({_first_line(error)})") from error
    # transformers 4.57 writes them into text_config for some families.
    architectures = found.get("architectures") or (found.get("text_config") or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UnknownModelError("config.json names no architecture")
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        raise UnknownModelError(f"transformers {transformers.__version__} has no {architectures[0]}")
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            model = kind(config)
        model.tie_weights()
    except Exception as error:  # whatever a model's own code raises on a config that it does not like
        raise UnknownModelError(f"{kind.__name__} cannot be made of config.json ({_first_line(error)})") from error
    return model, f"{kind.__name__} in memory (transformers {transformers.__version__})"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def linear_weights(source: str | os.PathLike[str], revision: str | None = None) -> dict[str, Tensor]:
    """The weights of the linear layers of a model (`meta_model`), by their names in memory. Raises CheckpointError when
    there is no such model."""
    try:
        model, _ = meta_model(source, revision)
    except UnknownModelError as error:
        raise CheckpointError(f"{source}: its config.json gives no model of transformers: {error}") from error
    return {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
