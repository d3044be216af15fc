"""Messages for what is found instead of a safetensors checkpoint, with advice."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .names import some

_GGUF = (
    "use the safetensors checkpoint that it was made from, or convert it with transformers, "
    "from_pretrained(folder, gguf_file=...).save_pretrained(...)"
)
_BEGINNINGS = (  # the first bytes of files, in lower case
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: run `git lfs pull` in its folder"),
    (b"gguf", f"a GGUF file: {_GGUF}"),
    (b"pk\x03\x04", "a torch.save file: save the model again with save_pretrained, as safetensors"),
    (b"<!doctype", "a web page: download the file again, logged in if necessary"),
    (b"<html", "a web page: download the file again, logged in if necessary"),
)
_NAMES = (  # the first entry with a matching pattern applies
    (
        ("adapter_config.json", "adapter_model.*"),
        "a PEFT (LoRA) adapter",
        "it is not a whole model: pass BASE+ADAPTER, its base and this folder (or merge them: merge_and_unload())",
    ),
    (("*.gguf",), "GGUF files", _GGUF),
    (("consolidated*", "*.pth"), "weights in their authors' format", "use the checkpoint for transformers"),
    (
        ("*.safetensors",),
        "safetensors files without an index",
        "add the index, or name the file model.safetensors if it is the only one",
    ),
    (("*.bin", "*.pt"), "PyTorch .bin files", "save the model again with save_pretrained, as safetensors"),
    (("*.distcp", "zero_to_fp32.py"), "a training checkpoint", "save the model with save_pretrained, as safetensors"),
    (("snapshots",), "a model in the Hub's cache", "pass one of the folders in snapshots, or the Hub id"),
)


def what_begins(head: bytes) -> str | None:
    """The type of a file that begins with these bytes, if it is one often found instead of a safetensors file."""
    return next((what for beginning, what in _BEGINNINGS if head[:64].lower().startswith(beginning)), None)


def what_lies_in(folder: Path) -> str:
    """The message for a folder without a checkpoint: what was found, and what to do. Raises OSError if the folder
    cannot be listed."""
    paths = sorted(folder.iterdir())
    if not paths:
        return "the folder is empty"
    if dangling := [path.name for path in paths if path.is_symlink() and not path.exists()]:
        return f"found links to files that do not exist ({some(dangling)}): download the model again"
    return what_they_are([path.name for path in paths])


def what_they_are(names: Sequence[str]) -> str:
    """The same, given only the names of the files."""
    for patterns, what, advice in _NAMES:
        if found := [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]:
            return f"found {what} ({some(found)}): {advice}"
    return f"found {some(names)}"
