"""Experts that one checkpoint stores fused and another one by one: locating each within the fused tensor.

Nothing is read here; a matrix is only described, and read later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import PriorError
from .checkpoint import Checkpoint
from .files import Source
from .fusion import expert_of, of_all_experts, of_one_expert, place_in_stack
from .views import Part, TransposedPart

# Families whose files hold fused experts in nn.Linear's orientation: gate_up_proj [experts, 2 * inter, hidden],
# down_proj [experts, hidden, inter].
_STRAIGHT = ("deepseek_ocr2_text", "minimax_m3_vl_text")
# Families whose published files store each matrix transposed, while files saved by transformers 5 do not.
_EITHER = ("qwen3_vl_moe",)


def unfuse(checkpoint: Checkpoint, tensors: Mapping[str, Source], wanted: Iterable[str]) -> dict[str, Source]:
    """Return the tensors with fused experts replaced by single ones, named like the `wanted` of another checkpoint.

    If it is unknown whether the fused matrices are transposed, the tensors are unchanged. If one expert is wanted, all
    are found.
    """
    stacks = {name: tensor.shape for name, tensor in tensors.items() if of_all_experts(name)}
    transposed = lie_transposed(checkpoint.config, stacks)
    if transposed is None:
        return dict(tensors)
    found, taken = dict(tensors), set()
    for name in wanted:
        place = place_in_stack(name, stacks) if name not in found else None
        if place is None:
            continue
        stack, stem, index, count = place
        whole = tensors[stack]
        if len(whole.shape) != 3 or whole.shape[2 if transposed else 1] % count:
            continue
        leaf = name.rsplit(".", 2)[1]
        for expert in range(whole.shape[0]):
            found[f"{stem}{expert}.{leaf}.weight"] = _matrix(whole, expert, index, count, transposed)
        taken.add(stack)
    return {name: tensor for name, tensor in found.items() if name not in taken}


def check_experts(models: Mapping[str, Iterable[str]]) -> None:
    """Raise PriorError if the roles have different experts in a layer: then equal numbers mean different experts."""
    numbers: dict[str, dict[str, set[int]]] = defaultdict(dict)
    for role, names in models.items():
        for name in filter(of_one_expert, names):
            if (found := expert_of(name)) is not None:
                numbers[found[0]].setdefault(role, set()).add(found[1])
    for stem, by_role in numbers.items():
        if len(set(map(frozenset, by_role.values()))) > 1:
            counts = ", ".join(f"{len(found)} in the {role}" for role, found in by_role.items())
            raise PriorError(
                f"the checkpoints do not fit: {stem.removesuffix('.')} has {counts}, so equal numbers are not the same "
                "expert; use --modules attn to leave them out"
            )


def lie_transposed(config: Mapping[str, Any], stacks: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Whether fused matrices are transposed, judging by the family and, if its files may be of either kind, by the
    sizes in the config. None if unknown: square matrices look the same either way; transformers reads these as stored.
    """
    family, text = config.get("model_type"), config.get("text_config")
    if family in _STRAIGHT:
        return False
    if family not in _EITHER or not isinstance(text, Mapping):
        return None
    hidden, inter = text.get("hidden_size"), text.get("moe_intermediate_size")
    if not isinstance(hidden, int) or not isinstance(inter, int) or hidden in (inter, 2 * inter):
        return None
    straight = {"gate_up_proj": (2 * inter, hidden), "down_proj": (hidden, inter)}
    kinds = set()
    for name, shape in stacks.items():
        expected = straight.get(name.rsplit(".", 1)[1], ())
        kinds.add(False if shape[1:] == expected else True if shape[1:] == expected[::-1] else None)
    return kinds.pop() if len(kinds) == 1 else None


def _matrix(whole: Source, expert: int, index: int, count: int, transposed: bool) -> Source:
    _, lines, stride = whole.shape
    rows, columns = (stride // count, lines) if transposed else (lines // count, stride)
    begin = expert * lines * stride + index * (rows if transposed else rows * columns)
    if transposed:
        return TransposedPart(whole, (rows, columns), begin, stride)
    return Part(whole, (rows, columns), begin)
