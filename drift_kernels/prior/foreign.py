"""What is found where a safetensors checkpoint was expected, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .names import some

_GGUF = (
    "take the safetensors checkpoint that it was made from, or save it as one with transformers, "
    "from_pretrained(folder, gguf_file=...).save_pretrained(...)"
)
_BEGINNINGS = (  # of files, in lower case
    (b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS: run `git lfs pull` in its folder"),
    (b"gguf", f"a GGUF file: {_GGUF}"),
    (b"pk\x03\x04", "a file of torch.save: save the model again with save_pretrained, as safetensors"),
    (b"<!doctype", "a web page: download the file again, logged in if need be"),
    (b"<html", "a web page: download the file again, logged in if need be"),
)
_NAMES = (  # the first whose pattern is found
    (
        ("adapter_config.json", "adapter_model.*"),
        "a PEFT (LoRA) adapter",
        "it is no whole model: give BASE+ADAPTER, its base and this (or merge them: merge_and_unload())",
    ),
    (("*.gguf",), "GGUF files", _GGUF),
    (("consolidated*", "*.pth"), "weights in their authors' own format", "take the checkpoint for transformers"),
    (
        ("*.safetensors",),
        "safetensors files without an index",
        "add the index, or name the file model.safetensors if it is the only one",
    ),
    (("*.bin", "*.pt"), "PyTorch .bin files", "save the model again with save_pretrained, as safetensors"),
    (("*.distcp", "zero_to_fp32.py"), "a training checkpoint", "save the model with save_pretrained, as safetensors"),
    (("snapshots",), "a model in the Hub's cache", "give one of the folders in snapshots, or the Hub id"),
)


def what_begins(head: bytes) -> str | None:
    """What a file is that begins like this, if it is among what often takes the place of a safetensors file."""
    return next((what for beginning, what in _BEGINNINGS if head[:64].lower().startswith(beginning)), None)


def what_lies_in(folder: Path) -> str:
    """What was found in a folder, which has no checkpoint, and what to do. Raises OSError when it cannot be listed."""
    paths = sorted(folder.iterdir())
    if not paths:
        return "the folder is empty"
    if dangling := [path.name for path in paths if path.is_symlink() and not path.exists()]:
        return f"found links to files that are not there ({some(dangling)}): download the model again"
    return what_they_are([path.name for path in paths])


def what_they_are(names: Sequence[str]) -> str:
    """The same by the names of files alone."""
    for patterns, what, advice in _NAMES:
        if found := [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]:
            return f"found {what} ({some(found)}): {advice}"
    return f"found {some(names)}"
