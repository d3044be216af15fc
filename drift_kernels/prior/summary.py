"""Norms and cosines of a prior's deltas, summed over groups: a layer's attention, a layer's q_proj."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

from .prior import Prior
from .record import DeltaInfo

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Group:
    """Several deltas treated as one long vector.

    `param_norm` is norm(W), None if any is unknown; `ratio` is norm(delta)/norm(W), None if norm(W) is zero or unknown;
    `stored_cosine` is the smallest of the deltas. `rank` is the largest of the low-rank deltas, and `kept_energy` the
    fraction of norm(exact delta)^2 that storage keeps; both None if none is low-rank.
    """

    tensors: int
    delta_norm: float
    param_norm: float | None
    ratio: float | None
    cosine: float | None
    stored_cosine: float | None
    rank: int | None
    kept_energy: float | None


def group_deltas(prior: Prior, key: Callable[[str], Key | None]) -> dict[Key, Group]:
    """Group the deltas by `key(canonical name)`, leaving out those whose key is None; in the prior's order."""
    members: dict[Key, list[DeltaInfo]] = {}
    for name in prior.names:
        if (group := key(name)) is not None:
            members.setdefault(group, []).append(prior.info(name))
    return {group: _add_up(infos) for group, infos in members.items()}


def _kept_energy(infos: list[DeltaInfo]) -> float | None:
    exact = [(info.delta_norm if info.exact_norm is None else info.exact_norm) ** 2 for info in infos]
    kept = [1.0 if info.kept_energy is None else info.kept_energy for info in infos]
    known = any(info.kept_energy is not None for info in infos)
    return sum(a * b for a, b in zip(exact, kept, strict=True)) / sum(exact) if known else None


def _add_up(infos: list[DeltaInfo]) -> Group:
    """The group of these deltas. Its cosine is the mean of the cosines, weighted by norm(W)^2."""
    delta_norm = math.hypot(*(info.delta_norm for info in infos))
    known = [info.param_norm for info in infos if info.param_norm is not None]
    param_norm = math.hypot(*known) if len(known) == len(infos) else None
    weighted = [(info.cosine, (info.param_norm or 0.0) ** 2) for info in infos if info.cosine is not None]
    weight = sum(square for _, square in weighted)
    return Group(
        tensors=len(infos),
        delta_norm=delta_norm,
        param_norm=param_norm,
        ratio=delta_norm / param_norm if param_norm else None,
        stored_cosine=min((info.stored_cosine for info in infos if info.stored_cosine is not None), default=None),
        rank=max((info.rank for info in infos if info.rank is not None), default=None),
        kept_energy=_kept_energy(infos),
        cosine=sum(cosine * square for cosine, square in weighted) / weight if weight else None,
    )
