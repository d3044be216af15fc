"""Coverage: which live parameters a prior binds to, and what is left over on either side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import PriorMismatchError
from .names import module_of, natural_key, some

Shape = tuple[int, ...]

_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Coverage:
    """The outcome of `Prior.match`. Parameter names are live names, prior names are canonical. An embedding or a head
    with more rows than its delta matches: tokens have been added, for which the delta is zero."""

    matched: dict[str, str]  # parameter name -> prior name
    shape_mismatches: list[tuple[str, str, Shape, Shape]]  # parameter name, prior name, parameter shape, prior shape
    prior_only: list[str]
    model_only: list[str]

    @classmethod
    def of(cls, live: Iterable[tuple[str, str, Shape]], shapes: Mapping[str, Shape]) -> Coverage:
        """Compare (live name, canonical name, shape) of a model with the shapes of a prior's deltas.

        Raises PriorMismatchError when two parameters claim one delta.
        """
        claimed: dict[str, str] = {}
        matched, shape_mismatches, model_only = {}, [], []
        for param, name, shape in live:
            if name not in shapes:
                model_only.append(param)
                continue
            if name in claimed:
                raise PriorMismatchError(f"{claimed[name]} and {param} both claim the delta {name}")
            claimed[name] = param
            if shape == shapes[name] or _more_tokens(name, shape, shapes[name]):
                matched[param] = name
            else:
                shape_mismatches.append((param, name, shape, shapes[name]))
        prior_only = sorted(shapes.keys() - claimed.keys(), key=natural_key)
        return cls(matched, shape_mismatches, prior_only, model_only)

    @property
    def complete(self) -> bool:
        """Every delta of the prior is bound."""
        return not self.prior_only and not self.shape_mismatches

    def summary(self) -> str:
        """The counts, with a few names of whatever did not match."""
        deltas = len(self.matched) + len(self.shape_mismatches) + len(self.prior_only)
        lines = [f"{len(self.matched)} of {deltas} deltas are bound to parameters"]
        if self.shape_mismatches:
            shown = [f"{param} {list(a)} against {list(b)}" for param, _, a, b in self.shape_mismatches]
            lines.append(f"  {len(shown)} differ in shape: {some(shown)}")
        if self.prior_only:
            lines.append(f"  {len(self.prior_only)} deltas have no parameter: {some(self.prior_only)}")
        if self.model_only:
            lines.append(f"  {len(self.model_only)} parameters have no delta: {some(self.model_only)}")
        if any("lora_" in param for param in self.model_only):
            lines.append("  adapters (LoRA) have no deltas: a prior acts on weights that are trained themselves")
        if any(map(_SINGLE_EXPERT.search, self.prior_only)) and any(map(_FUSED_EXPERTS.search, self.model_only)):
            lines.append("  this model holds its experts fused in one parameter; the prior holds them one by one")
        return "\n".join(lines)


def _more_tokens(name: str, shape: Shape, delta_shape: Shape) -> bool:
    """Whether the parameter is an embedding or a head to which tokens have been added."""
    return (
        module_of(name) in ("embed", "head")
        and len(shape) == len(delta_shape)
        and shape[1:] == delta_shape[1:]
        and shape[0] > delta_shape[0]
    )
