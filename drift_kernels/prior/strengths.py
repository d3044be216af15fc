"""alpha by pattern: a different strength of the prior for different parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .names import selector

AlphaLike = float | Tensor | Mapping[str, float]
"""alpha, or alpha by pattern: a mapping from entries of names.PRESETS or `re:REGEX` to numbers."""


@dataclass(frozen=True)
class Strengths:
    """Factors of alpha by pattern. The first pattern that matches a delta's canonical name applies; a delta that
    matches none is not used, as if its factor were 0."""

    entries: tuple[tuple[str, float], ...]

    @classmethod
    def split(cls, alpha: AlphaLike) -> tuple[float | Tensor, Strengths | None]:
        """Split alpha into that of the param groups, which is 1 if it is given by pattern, and the patterns.

        Raises TypeError or ValueError for an invalid pattern or number.
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
        """The factors of the deltas that are used, by name. Raises ValueError if a pattern matches no name."""
        names = list(names)
        factors: dict[str, float] = {}
        for pattern, factor in self.entries:
            fitting = list(filter(selector(pattern), names))
            if not fitting:
                raise ValueError(f"alpha by pattern: {pattern!r} matches none of the prior's {len(names)} deltas")
            for name in fitting:
                factors.setdefault(name, factor)
        return {name: factor for name, factor in factors.items() if factor}
