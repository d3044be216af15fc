"""Finding the language model of a checkpoint or live model by shape, if the name table does not know its names.

A list of layers is the part of a name before the first number: `text_model.model.layers.` in
`text_model.model.layers.3.mlp.up_proj.weight`. The language model is the one list in which the expert's matrices have
counterparts of the same name and shape.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..errors import PriorError, PriorMismatchError
from .checkpoint import Checkpoint
from .encodings import check_not_gguf
from .names import canonical_name, some

Shape = tuple[int, ...]
LayerList = dict[str, Shape]  # its matrices: the number and the rest of the name -> shape

_LAYERS = "layers."
_NUMBERED = re.compile(r"((?:[^.]*\.)*?)(\d+\..+)")
_EXPERT = re.compile(r"\.experts\.")


def align_checkpoints(
    checkpoints: Mapping[str, Checkpoint], name_map: Mapping[str, str] | None
) -> tuple[dict[str, str], list[str]]:
    """Return the name map, with rules for checkpoints (by role) without layers that the table knows, and notes on them.

    Raises PriorError if no list of layers fits, or more than one, and CheckpointError for GGUF names.
    """
    rules, notes = dict(name_map or {}), []
    shapes = {
        role: [(canonical_name(name, name_map), tensor.shape) for name, tensor in checkpoint.tensors.items()]
        for role, checkpoint in checkpoints.items()
    }
    for role, named in shapes.items():
        check_not_gguf(role, checkpoints[role], (name for name, _ in named))
    lists = {role: _layer_lists(named) for role, named in shapes.items()}
    base = lists["base"]
    for role in checkpoints.keys() - {"base"}:
        known = _LAYERS in lists[role] and _LAYERS in base
        if known or not (lists[role] or base):
            continue
        sizes = {place: _numel(matrices) for place, matrices in lists[role].items()}
        inner = _LAYERS if _LAYERS in sizes else max(sizes, key=lambda place: sizes[place], default=_LAYERS)
        places = [_LAYERS] if _LAYERS in base else list(base)
        fitting = [place for place in places if _fits(lists[role].get(inner, {}), base[place])]
        if len(fitting) != 1:
            unknown = role if _LAYERS in base else "base"
            raise PriorError(_refusal(checkpoints[unknown], fitting, list(lists[unknown])))
        for which, place in (("base", fitting[0]), (role, inner)):
            if place != _LAYERS and not rules.items() >= (rule := _rule_for(place)).items():
                rules |= rule
                notes.append(_note(f"the {which}", place, rule))
    return rules, notes


def align_live(live: Mapping[str, Shape], stored: Mapping[str, Shape]) -> tuple[dict[str, str], str | None]:
    """Return other canonical names for a live model (canonical name -> shape) that has none of a prior's layers, and a
    note on them.

    Either a module holds a model with known names (`self.model` of a LightningModule), of which only the trained part
    need be there; or the language model is the one list of layers with most of the prior's matrices. Returns no names
    if they are known already, or if nothing fits. Raises PriorMismatchError if more than one place fits.
    """
    inner = _layer_lists(stored.items()).get(_LAYERS, {})
    if not inner or any(name.startswith(_LAYERS) for name in live):
        return {}, None
    lists = _layer_lists(live.items())
    holders = _holders(live, stored)
    places = [place for place, matrices in lists.items() if _fits(inner, matrices)]
    fitting = holders + [place for place in places if not any(map(place.startswith, holders))]
    if len(fitting) > 1:
        options = _options(place for place in lists if any(map(place.startswith, fitting)))
        raise PriorMismatchError(
            f"the names of this model are not known, and the prior's layers fit in more than one place: "
            f"{some(fitting)}; pass the parameters of only one of them (named_groups(self.student)), or build the "
            f"prior with one of {options}"
        )
    if holders:
        (holder,) = holders
        note = f"the prior is matched with the model held as {holder.removesuffix('.')!r}"
        return {name: canonical_name(name.removeprefix(holder)) for name in live if name.startswith(holder)}, note
    if not fitting:
        return {}, None
    rule = _rule_for(fitting[0])
    return {name: canonical_name(name, rule) for name in live}, _note("this model", fitting[0], rule)


def _holders(live: Mapping[str, Shape], stored: Mapping[str, Shape]) -> list[str]:
    """The prefixes of names that the table knows, if all tensors under them have the shapes of the prior's deltas."""
    shapes: dict[str, dict[str, bool]] = defaultdict(dict)
    for name, shape in live.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            rest = ".".join(parts[i:])
            known = canonical_name(rest)
            if known != rest and known.startswith(_LAYERS):
                if known in stored:
                    shapes[".".join(parts[:i]) + "."][known] = stored[known] == shape
                break
    return [holder for holder, fits in shapes.items() if all(fits.values())]


def _layer_lists(named: Iterable[tuple[str, Shape]]) -> dict[str, LayerList]:
    """All lists of layers. Single experts are left out, because the same model may hold them fused."""
    found: dict[str, LayerList] = defaultdict(dict)
    for name, shape in named:
        if match := _NUMBERED.fullmatch(name):
            matrices = found[match[1]]
            if len(shape) > 1 and not _EXPERT.search(name):
                matrices[match[2]] = shape
    return found


def _fits(inner: LayerList, outer: LayerList) -> bool:
    """Whether most matrices of `inner` are in `outer`, all with the same shapes."""
    common = inner.keys() & outer.keys()
    return 2 * len(common) > len(inner) and all(inner[name] == outer[name] for name in common)


def _numel(matrices: LayerList) -> int:
    return sum(shape[0] * shape[1] for shape in matrices.values())


def _rule_for(place: str) -> dict[str, str]:
    """The name map that makes a list of layers that of the language model, and maps the tensors next to it too."""
    prefix = place.removesuffix(_LAYERS)
    return {prefix: ""} if prefix != place and prefix else {place: _LAYERS}


def _options(places: Iterable[str]) -> str:
    return " or ".join(f"--name-map {prefix}={to}" for place in places for prefix, to in _rule_for(place).items())


def _note(whose: str, place: str, rule: Mapping[str, str]) -> str:
    (prefix,) = rule
    return (
        f"the names of {whose} are not known: judging by names and shapes, its language model is under {prefix} "
        f"({_options([place])})"
    )


def _refusal(unknown: Checkpoint, fitting: list[str], places: list[str]) -> str:
    start = f"the checkpoints do not fit: no layers with known names in {unknown.folder}, and "
    if fitting:
        return f"{start}the other's layers fit in more than one place: {some(fitting)}; choose {_options(fitting)}"
    found = f"those under {some(places)} have different names or shapes" if places else "no names have numbers"
    return f"{start}{found}; if it has a language model, give its prefix with --name-map PREFIX="
