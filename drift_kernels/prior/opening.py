"""Opening the checkpoint that a user names: a folder, a Hub id, or one of these with an adapter, BASE+ADAPTER."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .hub import checkpoint_folder, is_hub_id, local_folder, public_name
from .peft_adapter import CONFIG_NAME, WEIGHTS_NAME, adapted
from .reading import exists

Given: TypeAlias = "str | os.PathLike[str]"


def open_checkpoint(source: Given) -> Checkpoint:
    """Open the checkpoint of a local folder, a Hub id, or `BASE+ADAPTER`, each of which is a folder or a Hub id. Raises
    CheckpointError."""
    base, adapter = _base_and_adapter(source)
    checkpoint = Checkpoint(*checkpoint_folder(base, "config.json"))
    if adapter is not None:
        checkpoint.tensors = adapted(checkpoint.tensors, _adapter_folder(adapter))
    return checkpoint


def name_for_the_record(source: Given) -> str:
    """The name of a source for the record, without local paths."""
    base, adapter = _base_and_adapter(source)
    return public_name(base) if adapter is None else f"{public_name(base)}+{public_name(adapter)}"


def _base_and_adapter(source: Given) -> tuple[Given, str | None]:
    """Split BASE+ADAPTER. An existing folder takes precedence, because names of folders may contain a `+` too."""
    text = os.fspath(source)
    if "+" not in text or _is_there(text):
        return source, None
    pieces = text.split("+")
    splits = [("+".join(pieces[:i]), "+".join(pieces[i:])) for i in range(1, len(pieces))]
    fitting = [split for split in splits if all(_is_there(part) or is_hub_id(part) for part in split)]
    if len(fitting) > 1:
        fitting = [split for split in fitting if all(map(_is_there, split))] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(f"{source}: ambiguous: can be split into BASE+ADAPTER in more than one way")
    missing = next((part for split in splits for part in split if not (_is_there(part) or is_hub_id(part))), text)
    raise CheckpointError(f"{source}: no such folder; read as BASE+ADAPTER, {missing or 'one part'} does not exist")


def _adapter_folder(adapter: str) -> Path:
    folder = local_folder(adapter, (CONFIG_NAME, WEIGHTS_NAME))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not exists(folder / name):
            raise CheckpointError(
                f"{folder}: expected {CONFIG_NAME} and {WEIGHTS_NAME} of a PEFT adapter, but {name} is missing"
            )
    return folder


def _is_there(text: str) -> bool:
    return bool(text) and exists(Path(text).expanduser())
