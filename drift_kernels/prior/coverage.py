"""Coverage: which live parameters a prior binds to, and what is left over on either side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .fusion import Source, find_sources, of_all_experts, of_one_expert
from .names import module_of, natural_key, some

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """How a model's parameters and a prior's deltas match: the result of `Prior.match`.

    Names of parameters are live names, those of deltas canonical. An embedding or head with more rows than its delta
    matches: added tokens have a delta of zero.

    Attributes:
        matched: name of each covered parameter -> its canonical name, which is also that of the delta if the delta is
            stored as one.
        shape_mismatches: parameter name, delta name, parameter shape and delta shape, if only the names fit.
        prior_only: deltas without a parameter.
        model_only: parameters without a delta.
        sources: parameter name -> what its delta is made of.
    """

    matched: dict[str, str]
    shape_mismatches: list[tuple[str, str, Shape, Shape]]
    prior_only: list[str]
    model_only: list[str]
    sources: dict[str, Source] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, live: Iterable[tuple[str, str, Shape]], shapes: Mapping[str, Shape]) -> Coverage:
        """Match a model's parameters with a prior's deltas.

        Args:
            live: live name, canonical name and shape of each parameter.
            shapes: canonical name -> shape of each delta.

        Returns:
            The coverage.

        Raises:
            PriorMismatchError: two parameters claim one delta.
        """
        live = list(live)
        sources = find_sources(live, shapes)
        matched, shape_mismatches, model_only = {}, [], []
        for param, name, shape in live:
            source = sources.get(param)
            if source is None:
                model_only.append(param)
            elif shape == source.shape or (source.single and _more_tokens(name, shape, source.shape)):
                matched[param] = name
            else:
                shape_mismatches.append((param, name, shape, source.shape))
        used = {part.name for source in sources.values() for part in source.parts}
        prior_only = sorted(shapes.keys() - used, key=natural_key)
        return cls(matched, shape_mismatches, prior_only, model_only, sources)

    @property
    def complete(self) -> bool:
        """Whether every delta of the prior is bound."""
        return not self.prior_only and not self.shape_mismatches

    def names(self) -> dict[str, Any]:
        """Return the names of both sides, for JSON.

        Returns:
            All attributes but `sources`.
        """
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sources"}

    def summary(self) -> str:
        """Describe the match.

        Returns:
            The counts, with a few names of whatever did not match, one line each.
        """
        parts = [len(self.sources[param].parts) for param in self.matched]
        bound, joined, parameters = sum(parts), sum(n for n in parts if n > 1), sum(n > 1 for n in parts)
        deltas = bound + len(self.shape_mismatches) + len(self.prior_only)
        lines = [f"{bound} of {deltas} deltas are bound to parameters"]
        if self.shape_mismatches:
            shown = [f"{param} {list(a)} vs. {list(b)}" for param, _, a, b in self.shape_mismatches]
            lines.append(f"  {len(shown)} differ in shape: {some(shown)}")
        if self.prior_only:
            lines.append(f"  {len(self.prior_only)} deltas have no parameter: {some(self.prior_only)}")
        if self.model_only:
            lines.append(f"  {len(self.model_only)} parameters have no delta: {some(self.model_only)}")
        if joined:
            why = ": this model holds its experts fused" if any(map(of_all_experts, self.matched)) else ""
            lines.append(f"  {joined} deltas are joined in {parameters} parameters{why}")
        if any("lora_" in param for param in self.model_only):
            lines.append(
                "  adapters (LoRA) have no deltas in the prior: use drift_kernels.integrations.peft.lora_prior"
            )
        if any(map(of_one_expert, self.prior_only)) and any(map(of_all_experts, self.model_only)):
            lines.append("  this model holds its experts fused, but the prior lacks some of the deltas to fuse")
        return "\n".join(lines)


def _more_tokens(name: str, shape: Shape, delta_shape: Shape) -> bool:
    """Whether the parameter is an embedding or a head to which tokens have been added."""
    return (
        module_of(name) in ("embed", "head")
        and len(shape) == len(delta_shape)
        and shape[1:] == delta_shape[1:]
        and shape[0] > delta_shape[0]
    )
