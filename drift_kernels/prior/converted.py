"""A prior for a model that a trainer holds in its own layout: deltas are converted like the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PriorError
from .coverage import Coverage
from .deltas import Delta, norm_of
from .fusion import Part, Source
from .names import layer_of, natural_key, without_wrappers
from .prior import Prior
from .quantized import Box
from .stored import norm_fault

Shape = tuple[int, ...]
Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Converts tensors of a checkpoint, by canonical name, to those of the model, by live name. A live tensor that is made
of several is left out if one of them is missing. Must accept tensors on the meta device too."""


class ConvertedPrior(Prior):
    """A prior whose deltas are converted in the way that a trainer converts a checkpoint's weights: renamed, joined,
    their rows permuted. A conversion that only moves elements commutes with differences, so it can be applied to
    deltas.

    Deltas keep their names, which patterns of alpha and modules refer to. The deltas of one live parameter are
    converted when they are read; a shard is cut from the result.

    Args:
        prior: the deltas, in the layout of checkpoints.
        shapes: the shapes of the weights in a checkpoint of this model, by canonical name.
        convert: the conversion.
    """

    def __init__(self, prior: Prior, shapes: Mapping[str, Shape], convert: Convert) -> None:
        super().__init__(prior._infos, prior._deltas, prior.fingerprint, prior.record)
        self._convert = convert
        known = [name for name in self.names if name in shapes]
        self._other_shapes = [name for name in known if self.info(name).shape != shapes[name]]
        self._model_shapes = shapes
        self._sources = self._trace([name for name in known if name not in self._other_shapes])

    def _trace(self, names: Iterable[str]) -> dict[str, Source]:
        """The sources of live parameters, by live name. Deltas in a layer are traced together, others singly."""
        groups: dict[int | str, list[str]] = defaultdict(list)
        for name in names:
            layer = layer_of(name)
            groups[name if layer is None else layer].append(name)
        sources = {}
        for group in groups.values():
            traced = {name: _Traced.of(name, self.info(name).shape) for name in group}
            for live, made in self._convert(traced).items():
                if isinstance(made, _Traced):
                    shape = tuple(made.shape)
                    into = tuple(slice(0, size) for size in shape)
                    # `transposed` marks that none of them is a stored delta without changes.
                    parts = [Part(name, into, transposed=True) for name in sorted(made.names, key=natural_key)]
                    sources[live] = Source(live, shape, tuple(parts))
        return sources

    def coverage(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Coverage:
        matched, mismatches, model_only, sources = {}, [], [], {}
        for param, tensor in named_parameters:
            name, shape = without_wrappers(param), tuple(tensor.shape)
            source = self._sources.get(name)
            if source is None:
                model_only.append(param)
                continue
            sources[param] = source
            if shape == source.shape:
                matched[param] = name
            else:
                mismatches.append((param, source.parts[0].name, shape, source.shape))
        for name in self._other_shapes:
            mismatches.append((name, name, self._model_shapes[name], self.info(name).shape))
        used = {part.name for source in sources.values() for part in source.parts} | {*self._other_shapes}
        prior_only = [name for name in self.names if name not in used]
        return Coverage(matched, mismatches, prior_only, model_only, sources)

    def load_stored(
        self, name: str | Source, device: torch.device | str | None = None, *, copy: bool = True, box: Box | None = None
    ) -> Delta:
        """As for any prior; for the source of a live parameter, convert its deltas.

        Raises PriorError if the result has another norm: then the conversion does not only move elements, and cannot be
        applied to a difference.
        """
        if not isinstance(name, Source):
            return super().load_stored(name, device, copy=copy, box=box)
        made = self._convert({part.name: self.load(part.name) for part in name.parts})[name.name].detach()
        if fault := norm_fault(norm_of(made), self.info(name).delta_norm):
            raise PriorError(
                f"{name.name}: cannot convert the prior, because the trainer's conversion of checkpoints changes "
                f"values, not only their positions (the converted delta is {fault})"
            )
        return (made if box is None else made[box].clone()).contiguous().to(device or made.device)


class _Traced(Tensor):
    """A tensor without values that tracks which deltas it is made of."""

    names: frozenset[str]

    @classmethod
    def of(cls, name: str, shape: Shape) -> _Traced:
        traced = torch.empty(shape, dtype=torch.float32, device="meta").as_subclass(cls)
        traced.names = frozenset([name])
        return traced

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        names = frozenset[str]().union(*(tensor.names for tensor in _traced_in([args, kwargs])))
        for tensor in _traced_in(result):
            tensor.names = getattr(tensor, "names", frozenset()) | names
        return result


def _traced_in(value: Any) -> list[_Traced]:
    if isinstance(value, _Traced):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [found for item in value for found in _traced_in(item)] if isinstance(value, (list, tuple)) else []
