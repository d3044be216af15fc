"""Which parameter here each saved state belongs to: the one of its name, or, without names, the one at its position."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .param_groups import names_of

ParamGroups = list[dict[str, Any]]

logger = logging.getLogger("drift_kernels")


def arranged(param_groups: ParamGroups, saved_groups: ParamGroups, plain: Callable[[str], str]) -> ParamGroups:
    """The saved groups as `param_groups` are: the ids of the same parameters in the same order, with hyperparameters.

    A group has the hyperparameters of the saved group of the same parameters, and where that one lacks some, or there
    is none of the same parameters, those that it has here.

    Raises ValueError for other parameters: of other names where both sides have names, of another number where not.
    """
    order = _by_name(param_groups, saved_groups, plain)
    if order is None:
        sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (param_groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(f"the state_dict has param groups of sizes {saved_sizes}, this optimizer of sizes {sizes}")
        order = [[(index, saved_id) for saved_id in group["params"]] for index, group in enumerate(saved_groups)]
    result, on_their_own = [], []
    for index, (group, members) in enumerate(zip(param_groups, order, strict=True)):
        source = _source(index, members, saved_groups)
        if source is None:
            on_their_own.append(str(index))
        hyperparameters = {**group, **({} if source is None else source)}
        names = {"param_names": group["param_names"]} if group.get("param_names") is not None else {}
        result.append({**hyperparameters, "params": [saved_id for _, saved_id in members], **names})
    if on_their_own:
        logger.warning(
            "param groups %s keep their hyperparameters: when the state_dict was saved, their parameters were in "
            "groups with others; states are loaded by name",
            ", ".join(on_their_own),
        )
    return result


def _source(index: int, members: list[tuple[int, Any]], saved_groups: ParamGroups) -> dict[str, Any] | None:
    """The saved group of these parameters and no others; of no parameters at all, the one at the same place."""
    found = {group for group, _ in members} or {index}
    if len(found) > 1 or (not members and index >= len(saved_groups)):
        return None
    source = saved_groups[found.pop()]
    return source if len(source["params"]) == len(members) else None


def _by_name(
    param_groups: ParamGroups, saved_groups: ParamGroups, plain: Callable[[str], str]
) -> list[list[tuple[int, Any]]] | None:
    """For each group here, of each of its parameters, the saved group and the id there; None without names.

    torch.distributed.checkpoint has parameters' names for ids, and has put them in order already, but not the names of
    their groups.
    """
    here, there = _all_names(param_groups), _all_names(saved_groups)
    ids = [(index, saved_id) for index, group in enumerate(saved_groups) for saved_id in group["params"]]
    if here is None or there is None:
        return None
    here, there = _comparable(here, there, plain)
    if Counter(here) != Counter(there):
        raise ValueError(_differences(here, there))
    if all(isinstance(saved_id, str) for _, saved_id in ids):
        here, there = _comparable(here, [saved_id for _, saved_id in ids], plain)
        if Counter(here) != Counter(there):
            return None
    place = dict(zip(_numbered(there), ids, strict=True))
    found = iter([place[name] for name in _numbered(here)])
    return [[next(found) for _ in group["params"]] for group in param_groups]


def _all_names(groups: ParamGroups) -> list[str] | None:
    names = [names_of(group) for group in groups]
    return None if None in names else [name for of_group in names for name in of_group or ()]


def _comparable(here: list[str], there: list[str], plain: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """The names as they are, or without what wrappers add, if they differ."""
    if Counter(here) == Counter(there):
        return here, there
    return list(map(plain, here)), list(map(plain, there))


def _numbered(names: list[str]) -> Iterator[tuple[str, int]]:
    """Each name, and how many of the same there were before: models that share an optimizer may share names."""
    before: Counter[str] = Counter()
    for name in names:
        yield name, before[name]
        before[name] += 1


def _differences(here: list[str], there: list[str]) -> str:
    others, lacks = Counter(there) - Counter(here), Counter(here) - Counter(there)
    parts = [f"has others, {_some(others)},"] if others else []
    parts += [f"lacks {_some(lacks)}"] if lacks else []
    return (
        f"the state_dict is of other parameters than this optimizer: it {' and '.join(parts)}; to load it by position, "
        "remove 'param_names' from its param groups"
    )


def _some(names: Counter[str]) -> str:
    return f"{names.total()} ({', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''})"
