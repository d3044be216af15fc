"""Rules for making the delta of a live parameter from stored deltas, if a model in memory has other tensors than its
files.

transformers 5 joins and renames tensors inside layers when it loads them: experts that are stored one by one become one
parameter, `experts.gate_up_proj` [experts, rows of gate and of up, columns]; `block_sparse_moe` becomes `mlp`. The
rules are those of its conversion_mapping.py for language models; shapes are checked. Each applies in both directions: a
prior with the names of a live model also fits a model that holds its experts one by one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import PriorMismatchError
from .quantized import Box

Shape = tuple[int, ...]

# Different spellings: (in memory, on disk). Applied from the top; a rule may apply to the result of one above it.
_SPELLINGS = (
    (".mlp.", ".block_sparse_moe."),  # Mixtral, MiniMax, Phi-3.5-MoE, Kimi-Linear
    (".mlp.text_moe.", ".mlp."),  # ERNIE 4.5 VL; its vision experts have no counterpart in a text model
    (".mlp.shared_experts.", ".mlp.shared_expert."),  # Laguna
    (".mlp.shared_experts.", ".mlp.shared_mlp."),  # HunYuan 3
    (".mlp.shared_experts.", ".share_expert."),  # Step 3.7, as the next two
    (".mlp.experts.gate_up_proj", ".moe.gate_up_proj.weight"),
    (".mlp.experts.down_proj", ".moe.down_proj.weight"),
    (".mlp.experts.gate_up_proj", ".mlp.experts.fc1.weight"),  # Aria
    (".mlp.experts.down_proj", ".mlp.experts.fc2.weight"),
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),  # Granite MoE and hybrids
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".self_attn.forget_gate.", ".self_attn."),  # Kimi-Linear, GLM 5 Next
    (".self_attn.q_gate_proj.", ".self_attn.q_b_proj."),  # A.X K2
    (".self_attn.g_proj.", ".self_attn.gate_proj."),  # LFM 3
    (".gate_proj.", ".linear_gate."),  # HunYuan 4
    (".mlp.router.", ".block_sparse_moe.gate."),  # routers: Phi-3.5-MoE
    (".mlp.gate.", ".mlp.router.gate."),  # HunYuan 3
    (".mlp.gate.", ".moe.gate."),  # Step 3.7
    (".block_sparse_moe.router.", ".block_sparse_moe.router.layer."),  # Granite
    (".self_attn.", ".attention."),  # Bailing, as the next
    (".attention.o_proj.", ".attention.dense."),
)

# Matrices joined along rows: the name in memory, and the possible names on disk.
_JOINS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("w2",),),
    "conv1d": (("q_conv1d", "k_conv1d", "v_conv1d"),),
}
# Matrices stacked by expert.
_STACKS = {
    "gate_up_proj": _JOINS["gate_up_proj"],
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),  # Nemotron-H has no gate
}

_JOINED = re.compile(r"(.+\.)(gate_up_proj|conv1d)(\.weight|\.bias)")
_HALF = re.compile(r"(.+\.)(gate_proj|up_proj)(\.weight|\.bias)")
_STACKED = re.compile(rf"(.+\.experts\.)({'|'.join(_STACKS)})")
_SINGLE_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"layers\.\d+\.")
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_OF_ALL_EXPERTS = re.compile(rf"\.experts\.(?:{'|'.join(_STACKS)})")


@dataclass(frozen=True)
class Part:
    """A stored delta, or a box of it, and the box of the live parameter that it fills.

    A stored matrix can fill one matrix of a stack; `transposed` swaps its last two dimensions.
    """

    name: str
    into: Box
    of: Box | None = None  # None: all of it
    transposed: bool = False


@dataclass(frozen=True)
class Source:
    """The parts that make the delta of a live parameter. `name` is the parameter's canonical name; `shape` is that of
    all parts together, which is the parameter's shape if they belong to its model."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]

    @classmethod
    def stored(cls, name: str, shape: Shape, stored_name: str | None = None) -> Source:
        """The source that is one stored delta, maybe under another name."""
        return cls(name, shape, (Part(stored_name or name, _all_of(shape)),))

    @property
    def single(self) -> Part | None:
        """The only part, if the source is one stored delta without changes."""
        part = self.parts[0]
        return part if len(self.parts) == 1 and part.of is None and not part.transposed else None


def of_one_expert(name: str) -> bool:
    """Whether a tensor belongs to a single expert: `layers.3.mlp.experts.0.up_proj.weight`."""
    return _OF_ONE_EXPERT.search(name) is not None


def of_all_experts(name: str) -> bool:
    """Whether a tensor holds the fused matrices of all experts: `layers.3.mlp.experts.gate_up_proj`."""
    return _OF_ALL_EXPERTS.search(name) is not None


def expert_of(name: str) -> tuple[str, int] | None:
    """The group of experts that a single expert's weight belongs to, and the number of the expert."""
    match = _SINGLE_EXPERT.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


def place_in_stack(name: str, stacks: Container[str]) -> tuple[str, str, int, int] | None:
    """The position of a single expert's weight in a fused stack: the stack's name, the name up to the expert's number,
    and the index and number of the equal parts that the rows are divided into."""
    if match := _SINGLE_EXPERT.fullmatch(name):
        for fused, index, count in _places(_STACKS, match[3]):
            for stack in _spellings(match[1] + fused):
                if stack in stacks:
                    return stack, match[1], index, count
    return None


def stored_names(delta: str | Source) -> tuple[str, ...]:
    """The names of the stored deltas that a delta is made of."""
    return (delta,) if isinstance(delta, str) else tuple(part.name for part in delta.parts)


def find_sources(live: Iterable[tuple[str, str, Shape]], stored: Mapping[str, Shape]) -> dict[str, Source]:
    """Return the sources of the live parameters (live name, canonical name, shape) that have one, by live name.

    `stored` holds the shapes of a prior's deltas. Parameters are matched by name first; rules apply to the deltas that
    are left. A source may have another shape than its parameter, which then belongs to a different model. Raises
    PriorMismatchError if two parameters claim one delta.
    """
    claimed: dict[str, str] = {}
    sources: dict[str, Source] = {}
    others: list[tuple[str, str, Shape]] = []
    for param, name, shape in live:
        if name not in stored:
            others.append((param, name, shape))
            continue
        _claim(claimed, name, param)
        sources[param] = _as_shaped(name, name, shape, stored)
    free = {name: shape for name, shape in stored.items() if name not in claimed}
    for param, name, shape in others if free else ():
        source = _made(name, shape, free) if _LAYER.match(name) else None
        if source is not None:
            _claim(claimed, name, param)
            sources[param] = source
            for part in source.parts:
                if part.of is None:
                    del free[part.name]
    return sources


def _claim(claimed: dict[str, str], name: str, param: str) -> None:
    if name in claimed:
        raise PriorMismatchError(f"{claimed[name]} and {param} both claim the delta {name}")
    claimed[name] = param


def _made(name: str, shape: Shape, stored: Mapping[str, Shape]) -> Source | None:
    """The source that a rule gives for the parameter's shape; otherwise one of several parts with another shape."""
    found = [source for spelled in _spellings(name) for source in _candidates(name, spelled, shape, stored)]
    fitting = [source for source in found if source.shape == shape]
    return next(iter(fitting or [source for source in found if len(source.parts) > 1]), None)


def _candidates(name: str, spelled: str, shape: Shape, stored: Mapping[str, Shape]) -> Iterator[Source]:
    if spelled in stored:
        yield _as_shaped(name, spelled, shape, stored)
    if match := _JOINED.fullmatch(spelled):
        for leaves in _JOINS[match[2]]:
            yield from _joined(name, [match[1] + leaf + match[3] for leaf in leaves], stored)
    if match := _STACKED.fullmatch(spelled):
        for leaves in _STACKS[match[2]]:
            yield from _stacked(name, match[1], leaves, stored)
    if match := _SINGLE_EXPERT.fullmatch(spelled):
        for fused, index, count in _places(_STACKS, match[3]):
            for stack in _spellings(match[1] + fused):
                yield from _slice(name, stack, shape, stored, (int(match[2]), index, count))
    if match := _HALF.fullmatch(spelled):
        for fused, index, count in _places(_JOINS, match[2]):
            yield from _slice(name, match[1] + fused + match[3], shape, stored, (None, index, count))


def _spellings(name: str) -> list[str]:
    """The name itself, and its possible spellings on disk and in memory."""
    found = [name]
    for one, other in _SPELLINGS:
        found += [new for known in found if (new := known.replace(one, other, 1)) not in found]
    return found + [new for one, other in _SPELLINGS if (new := name.replace(other, one, 1)) not in found]


def _as_shaped(name: str, stored_name: str, shape: Shape, stored: Mapping[str, Shape]) -> Source:
    """A source of one stored delta; fused experts are transposed if that gives the shape (as in Qwen3-VL-MoE)."""
    found = stored[stored_name]
    if found != shape and len(found) == 3 and (found[0], found[2], found[1]) == shape and _STACKED.fullmatch(name):
        return Source(name, shape, (Part(stored_name, _all_of(shape), transposed=True),))
    return Source.stored(name, found, stored_name)


def _joined(name: str, names: list[str], stored: Mapping[str, Shape]) -> Iterator[Source]:
    if not all(part in stored for part in names):
        return
    shapes = [stored[part] for part in names]
    dim = 1 if _STACKED.fullmatch(name) else 0
    if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) != 1 or len(shapes[0]) <= dim:
        return
    parts, rows = [], 0
    for part, shape in zip(names, shapes, strict=True):
        into = (*_all_of(shape[:dim]), slice(rows, rows + shape[dim]), *_all_of(shape[dim + 1 :]))
        parts.append(Part(part, into))
        rows += shape[dim]
    yield Source(name, (*shapes[0][:dim], rows, *shapes[0][dim + 1 :]), tuple(parts))


def _stacked(name: str, stem: str, leaves: tuple[str, ...], stored: Mapping[str, Shape]) -> Iterator[Source]:
    """A stack of all stored experts that have the shapes of the first; and the same with each matrix transposed, as in
    Qwen3-VL-MoE with transformers 4."""
    shapes = [stored.get(f"{stem}0.{leaf}.weight") for leaf in leaves]
    parts: list[Part] = []
    expert = 0
    while all(
        shape is not None and len(shape) == 2 and stored.get(f"{stem}{expert}.{leaf}.weight") == shape
        for leaf, shape in zip(leaves, shapes, strict=True)
    ):
        rows = 0
        for leaf, shape in zip(leaves, shapes, strict=True):
            into = (slice(expert, expert + 1), slice(rows, rows + shape[0]), slice(0, shape[1]))  # type: ignore[index]
            parts.append(Part(f"{stem}{expert}.{leaf}.weight", into))
            rows = into[1].stop
        expert += 1
    if len(parts) == 1:  # a stack of one matrix does not have the stored shape
        parts = [replace(parts[0], of=_all_of(stored[parts[0].name]))]
    if parts:
        rows, columns = parts[-1].into[1].stop, parts[-1].into[2].stop
        yield Source(name, (expert, rows, columns), tuple(parts))
        swapped = (replace(part, into=(part.into[0], part.into[2], part.into[1]), transposed=True) for part in parts)
        yield Source(name, (expert, columns, rows), tuple(swapped))


def _places(rules: Mapping[str, tuple[tuple[str, ...], ...]], leaf: str) -> Iterator[tuple[str, int, int]]:
    """The fused tensors that a leaf may be in: their name, and the index and number of parts that the rows have."""
    for fused, ways in rules.items():
        yield from ((fused, leaves.index(leaf), len(leaves)) for leaves in ways if leaf in leaves)


def _slice(
    name: str, fused: str, shape: Shape, stored: Mapping[str, Shape], place: tuple[int | None, int, int]
) -> Iterator[Source]:
    """A source that is one of `count` equal parts of the rows of a stored delta, or of one expert in it."""
    expert, index, count = place
    whole = stored.get(fused)
    expected = (count * shape[0], *shape[1:])
    if whole is None or whole[0 if expert is None else 1 :] != expected or (expert is not None and expert >= whole[0]):
        return
    rows = slice(index * shape[0], (index + 1) * shape[0])
    of = (rows, *_all_of(shape[1:]))
    yield Source(
        name, shape, (Part(fused, _all_of(shape), of if expert is None else (slice(expert, expert + 1), *of)),)
    )


def _all_of(shape: Shape) -> Box:
    return tuple(slice(0, size) for size in shape)
