"""Experts that one checkpoint stores fused and another one by one: each is found in its place in the fused tensor.

Nothing is read here: a matrix is described, and read later from where it lies.
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
# Families whose published files hold each matrix transposed, and those that transformers 5 saves do not.
_EITHER = ("qwen3_vl_moe",)


def unfuse(checkpoint: Checkpoint, tensors: Mapping[str, Source], wanted: Iterable[str]) -> dict[str, Source]:
    """The tensors, where fused experts are replaced by single ones, named as the `wanted` of another checkpoint are.

    As they were, if it is not known whether they lie transposed. All experts are found, however many
    are wanted.
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
    """Raises PriorError if the names, by role, hold different experts in one layer: their numbers say nothing then."""
    numbers: dict[str, dict[str, set[int]]] = defaultdict(dict)
    for role, names in models.items():
        for name in filter(of_one_expert, names):
            if (found := expert_of(name)) is not None:
                numbers[found[0]].setdefault(role, set()).add(found[1])
    for stem, by_role in numbers.items():
        if len(set(map(frozenset, by_role.values()))) > 1:
            counts = ", ".join(f"{len(found)} in the {role}" for role, found in by_role.items())
            raise PriorError(
                f"the checkpoints do not fit: the experts of {stem.removesuffix('.')} are {counts}, and those of one "
                "number are not the same expert; --modules attn leaves them out"
            )


def lie_transposed(config: Mapping[str, Any], stacks: Mapping[str, tuple[int, ...]]) -> bool | None:
    """By the family and, where its files may be of either kind, by the sizes in the config. None if these do not tell:
    a square matrix is the same either way, and then transformers, too, takes it as it lies."""
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
