"""Detection of weights that are quantised, or that have unmerged adapters.

FP8 with scales is read as plain weights (scaled.py), and so is an adapter over a base (adapted.py). Other encodings use
other names, so a build would ignore these weights and make a prior of the rest: of the biases alone. It is an error if
a selected weight is affected; a quantised vision tower does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .files import FLOATING, Source
from .scaled import CODES_OF_SCALES

# The suffixes of a module's name in the tensors that replace its weight, by method. Some methods share names; if the
# checkpoint's config names a method, that takes precedence.
_QUANTISED = (
    ("bitsandbytes", r"\.weight\.(?:absmax|quant_map|nested_\w+|quant_state\..+)|\.(?:SCB|weight_format)"),
    ("GPTQ or AWQ", r"\.(?:qweight|qzeros|g_idx)"),
    ("compressed-tensors", r"\.weight_(?:packed|shape|zero_point|g_idx)"),
    ("FP8", r"\.weight_scale_inv"),
    ("FP8, NVFP4 or compressed-tensors", r"\.weight_scale(?:_2)?"),
    ("HQQ", r"\.W_q"),
    ("AQLM", r"\.(?:codes|codebooks)"),
    ("Quanto", r"\.weight\._(?:data|scale|shift)"),
    ("torchao", r"\._weight_\w+"),
    ("EETQ", r"\.weight_scales"),
    ("MXFP4", r"_(?:blocks|scales)"),
)
_ADAPTER = r"\.(?:(?:lora|ia3|oft|boft|vera|hada|lokr|loha)_\w+|base_layer|modules_to_save|original_module)(?:\..+)?"
_MARKS = [(method, re.compile(rf"(.+?)(?:{mark})")) for method, mark in (*_QUANTISED, ("PEFT", _ADAPTER))]
_ADAPTED = re.compile(_ADAPTER)
_GGUF = re.compile(r"blk\.\d+\.(?:attn|ffn)_\w+\.weight")


def check_not_gguf(role: str, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise CheckpointError for tensor names of GGUF, in which no layers can be found."""
    if found := list(filter(_GGUF.fullmatch, names)):
        raise CheckpointError(_quantised(role, checkpoint, found[0], "GGUF names", len(found)))


def check_encodings(
    role: str, checkpoint: Checkpoint, tensors: Mapping[str, Source], wanted: Iterable[str], found: set[str]
) -> None:
    """Raise CheckpointError if selected weights are quantised or have unmerged adapters.

    Args:
        tensors: the checkpoint's tensors, by canonical name.
        wanted: selected canonical names that any of the checkpoints has.
        found: selected names that `marked_weights` found in this checkpoint.
    """
    asked = {*wanted, *found}
    parts = _parts_of_modules(tensors, {name.removesuffix(".weight") for name in asked})
    adapted: list[str] = []
    unscaled: list[str] = []
    quantised: list[tuple[str, str]] = []  # name, method
    for name in sorted(asked):
        stem = name.removesuffix(".weight")
        beside = sorted(parts.get(stem, set()) - {"weight", "bias"}) if stem != name else []
        methods = [method for part in beside if (method := _method(f"{stem}.{part}"))]
        methods += ["MXFP4"] if name in found and stem == name else []
        if "PEFT" in methods:
            adapted.append(name)
        elif name in tensors and tensors[name].dtype not in FLOATING:
            if not methods and tensors[name].dtype in CODES_OF_SCALES:
                unscaled.append(name)
            else:
                quantised.append((name, methods[0] if methods else f"its dtype is {tensors[name].dtype}"))
        elif name not in tensors and (methods or (beside and _method_of_config(checkpoint.config))):
            quantised.append((name, methods[0] if methods else ""))
    if adapted:
        raise CheckpointError(
            f"{checkpoint.folder}: the {role} contains adapters that are not merged ({len(adapted)} of the selected "
            f"tensors, such as {adapted[0]}). Save only the adapter, with PEFT's save_pretrained, and pass "
            "BASE+ADAPTER; or save model.merge_and_unload()"
        )
    if unscaled:
        raise CheckpointError(
            f"{checkpoint.folder}: the {role} contains FP8 codes without scales: {len(unscaled)} of the selected "
            f"tensors, such as {unscaled[0]}"
        )
    if quantised:
        raise CheckpointError(_quantised(role, checkpoint, *quantised[0], len(quantised)))


def marked_weights(names: Iterable[str]) -> set[str]:
    """The canonical names of the weights that are replaced by other tensors among these names."""
    found = set()
    for name in names:
        if name.endswith((".weight", ".bias")) and not _ADAPTED.search(name):
            continue
        for method, mark in _MARKS:
            if match := mark.fullmatch(name):
                found.add(match[1] if method == "MXFP4" else f"{match[1]}.weight")
                break
    return found


def _method(name: str) -> str | None:
    return next((method for method, mark in _MARKS if mark.fullmatch(name)), None)


def _parts_of_modules(names: Iterable[str], modules: set[str]) -> dict[str, set[str]]:
    """Map each of these modules to the suffixes of its name in the tensors below it."""
    parts: dict[str, set[str]] = {}
    for name in names:
        end = name.rfind(".")
        while end > 0:
            if name[:end] in modules:
                parts.setdefault(name[:end], set()).add(name[end + 1 :])
            end = name.rfind(".", 0, end)
    return parts


def _quantised(role: str, checkpoint: Checkpoint, name: str, method: str, count: int) -> str:
    said = _method_of_config(checkpoint.config)
    return (
        f"{checkpoint.folder}: the {role} is quantised ({said or method}): {count} of the selected tensors are not "
        f"plain weights, such as {name}; dequantise the checkpoint first"
    )


def _method_of_config(config: Mapping[str, Any]) -> str | None:
    for part in (config, *config.values()):
        if isinstance(part, Mapping) and isinstance(quantised := part.get("quantization_config"), Mapping):
            if quantised.get("quant_method"):
                return str(quantised["quant_method"])
            if quantised.get("load_in_4bit") or quantised.get("load_in_8bit"):
                return "bitsandbytes"
    return None
