"""What a model will hold in memory: the names and shapes of a checkpoint's parameters once it is loaded."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .files import Checkpoint

NamedParameters = list[tuple[str, Tensor]]


def live_parameters(checkpoint: Checkpoint) -> tuple[NamedParameters, str]:
    """The parameters of the model of a checkpoint, on the meta device, and a line that says whose names these are.

    They are those of the class of transformers that config.json names. Without transformers, or for a class that it
    does not have or cannot make, they are the tensors on disk, and the line says why.
    """
    try:
        return _from_transformers(checkpoint)
    except _UnknownModelError as error:
        on_disk = [
            (name, torch.empty(t.shape, dtype=torch.float32, device="meta")) for name, t in checkpoint.tensors.items()
        ]
        return on_disk, f"by the names on disk, since {error}: in memory the model may hold others"


class _UnknownModelError(Exception):
    pass


def _from_transformers(checkpoint: Checkpoint) -> tuple[NamedParameters, str]:
    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise _UnknownModelError("config.json names no architecture")
    if importlib.util.find_spec("transformers") is None:
        raise _UnknownModelError("transformers is not installed")
    import transformers

    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        raise _UnknownModelError(f"transformers {transformers.__version__} has no {architectures[0]}")
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            model = kind(config)
        model.tie_weights()
    except Exception as error:  # whatever a model's own code raises on a config that it does not like
        raise _UnknownModelError(f"{kind.__name__} cannot be made of config.json ({error})") from error
    names = f"by the names of {kind.__name__} in memory (transformers {transformers.__version__})"
    return list(model.named_parameters()), names


def linear_weights(base: str, revision: str | None = None) -> dict[str, Tensor]:
    """The weights of a model's linear layers by their names in memory, on the meta device: of the class of transformers
    that a config.json names, in a folder or on the Hub. Raises CheckpointError when there is no such model."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(base, revision=revision or "main")
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except Exception as error:  # whatever transformers raises on what it does not know
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{base}: its config.json gives no model of transformers: {reason}") from error
    modules = model.named_modules()
    return {f"{name}.weight": module.weight for name, module in modules if isinstance(module, nn.Linear)}
