"""Matching saved states with parameters: by name, or by position where there are no names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .param_groups import names_of

ParamGroups = list[dict[str, Any]]

logger = logging.getLogger("drift_kernels")


def arranged(param_groups: ParamGroups, saved_groups: ParamGroups, plain: Callable[[str], str]) -> ParamGroups:
    """Return the saved groups in the layout of `param_groups`: the ids of the same parameters, in the same order.

    A group takes its hyperparameters from the saved group that has the same parameters. It keeps its current value of
    any that the saved group lacks, and all current values if no saved group has the same parameters.

    Raises ValueError if the parameters differ: in their names if both sides have names, otherwise in their number.
    """
    order = _by_name(param_groups, saved_groups, plain)
    if order is None:
        sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (param_groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(f"the state_dict has param groups of sizes {saved_sizes}, this optimizer has {sizes}")
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
            "param groups %s keep their current hyperparameters, because the state_dict groups their parameters "
            "differently; states are loaded by name",
            ", ".join(on_their_own),
        )
    return result


def _source(index: int, members: list[tuple[int, Any]], saved_groups: ParamGroups) -> dict[str, Any] | None:
    """The saved group with exactly these parameters; for an empty group, the saved one at the same index."""
    found = {group for group, _ in members} or {index}
    if len(found) > 1 or (not members and index >= len(saved_groups)):
        return None
    source = saved_groups[found.pop()]
    return source if len(source["params"]) == len(members) else None


def _by_name(
    param_groups: ParamGroups, saved_groups: ParamGroups, plain: Callable[[str], str]
) -> list[list[tuple[int, Any]]] | None:
    """For each group, the saved group and the saved id of each of its parameters; None without names.

    torch.distributed.checkpoint uses parameter names as ids. It has already put these in order, but not the names in
    the groups.
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
    """The names unchanged if both sides agree, otherwise without what wrappers add."""
    if Counter(here) == Counter(there):
        return here, there
    return list(map(plain, here)), list(map(plain, there))


def _numbered(names: list[str]) -> Iterator[tuple[str, int]]:
    """Yield each name with its number of earlier occurrences: models that share an optimizer may share names."""
    before: Counter[str] = Counter()
    for name in names:
        yield name, before[name]
        before[name] += 1


def _differences(here: list[str], there: list[str]) -> str:
    others, lacks = Counter(there) - Counter(here), Counter(here) - Counter(there)
    parts = [f"unexpected {_some(others)}"] if others else []
    parts += [f"missing {_some(lacks)}"] if lacks else []
    return (
        f"the parameters of the state_dict are not those of this optimizer: {', '.join(parts)}; to load it by "
        "position, remove 'param_names' from its param groups"
    )


def _some(names: Counter[str]) -> str:
    return f"{names.total()} ({', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''})"
