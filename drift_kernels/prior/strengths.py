"""alpha by pattern: how strong a prior is where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .names import selector

AlphaLike = float | Tensor | Mapping[str, float]
"""alpha, or alpha by pattern: entries of names.PRESETS or `re:REGEX` -> number."""


@dataclass(frozen=True)
class Strengths:
    """Factors of alpha. The first pattern that fits a delta's canonical name decides; a delta that none fits is left
    alone, as one whose factor is 0."""

    entries: tuple[tuple[str, float], ...]

    @classmethod
    def split(cls, alpha: AlphaLike) -> tuple[float | Tensor, Strengths | None]:
        """The alpha of param groups, 1 where it is given by pattern, and the patterns.

        Raises TypeError or ValueError for a pattern or a number that is none.
        """
        if not isinstance(alpha, Mapping):
            return alpha, None
        for pattern, number in alpha.items():
            if not isinstance(pattern, str) or isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"alpha by pattern must map patterns to numbers, got {pattern!r}: {number!r}")
            if not math.isfinite(number):
                raise ValueError(f"alpha must be finite, got alpha={number} for {pattern!r}")
            try:
                selector(pattern)
            except ValueError as error:
                raise ValueError(f"alpha by pattern: {error}") from None
        if not any(alpha.values()):
            raise ValueError(f"alpha by pattern is zero everywhere: {dict(alpha)}")
        return 1.0, cls(tuple((pattern, float(number)) for pattern, number in alpha.items()))

    def of(self, names: Iterable[str]) -> dict[str, float]:
        """The factor of each delta that is not left alone. Raises ValueError for a pattern that fits no name."""
        names = list(names)
        factors: dict[str, float] = {}
        for pattern, factor in self.entries:
            fitting = list(filter(selector(pattern), names))
            if not fitting:
                raise ValueError(f"alpha by pattern: {pattern!r} fits none of the prior's {len(names)} deltas")
            for name in fitting:
                factors.setdefault(name, factor)
        return {name: factor for name, factor in factors.items() if factor}
