"""The deltas of adapter parameters: projected from the deltas of the weights, and renewed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapter, AdapterPrior, Factors, made, merged, projected
from ..errors import PriorError
from ..prior.deltas import Delta, tensors_of, with_rows
from ..prior.names import without_wrappers
from ..sharding import Shard, local, whole, wrap
from ..state.precision import PROJECTED
from ..torch_private import version_of

A, B = 0, 1


class MadeOf(NamedTuple):
    """The inputs that a factor's delta was made from: whether it is for `decoupled` (None if unknown, for a loaded
    delta), and an identification of the other factor, if that is constant."""

    decoupled: bool | None
    fixed: tuple[Any, ...] | None


@dataclass
class Side:
    """The delta of a trained factor of an adapter.

    Attributes:
        delta: float32, shape of the factor's local tensor.
        norm: float64 [], the norm of the delta of the whole factor.
        whole_norm: likewise, before the part that the adapter has already learned is subtracted.
        made_of: None until the delta is made.
    """

    delta: Tensor
    norm: Tensor
    whole_norm: Tensor
    shard: Shard | None
    made_of: MadeOf | None = None

    @classmethod
    def of(cls, param: Tensor, shard: Shard | None) -> Side:
        """`param`: the factor's local tensor."""
        delta = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
        norms = torch.zeros(2, dtype=torch.float64, device=param.device)
        return cls(delta, norms[0], norms[1], shard)

    def differs(self, made_of: MadeOf, due: bool) -> bool:
        """Whether the delta must be made anew from these inputs."""
        if self.made_of is None or self.made_of.decoupled not in (None, made_of.decoupled):
            return True
        return due and (made_of.fixed is None or made_of.fixed != self.made_of.fixed)

    def take(self, found: Tensor, taken_off: Tensor | None = None) -> None:
        """Set the delta to that of the whole factor, `found`, minus `taken_off`."""
        found = found.float()
        self.whole_norm.copy_(torch.linalg.vector_norm(found, dtype=torch.float64))
        if taken_off is not None:
            found = found - taken_off.float()
        self.norm.copy_(torch.linalg.vector_norm(found, dtype=torch.float64))
        self.delta.copy_(found if self.shard is None else found[self.shard.box])


class Projection:
    """The delta of a weight, and the deltas of its adapter's factors.

    Args:
        delta: on the adapter's device, or in host memory, from which each renewal copies it.
        device: the device of the adapter.
        anchored: whether to subtract the part of the delta that the adapter has already learned.
    """

    def __init__(self, adapter: Adapter, delta: Delta, device: torch.device, anchored: bool) -> None:
        self.anchored = anchored
        self.adapter = adapter
        self.delta = delta
        self.device = device
        self._sides: dict[int, Side] = {}

    def bind(self, factor: int, param: Tensor, shard: Shard | None) -> Side:
        """Add a factor, A or B. Its delta is zero until `renew`."""
        self._sides[factor] = Side.of(param, shard)
        return self._sides[factor]

    def side(self, factor: int) -> Side:
        return self._sides[factor]

    def forget(self) -> None:
        for side in self._sides.values():
            side.made_of = None

    def renew(self, decoupled: Mapping[int, bool], due: bool) -> None:
        """Renew the deltas of these factors (A, B), see `Adapted.renew`. No host sync."""
        made_of = {factor: self._made_of(factor, decoupled[factor]) for factor in decoupled}
        wanted = [factor for factor, found in made_of.items() if self._sides[factor].differs(found, due)]
        if not wanted:
            return
        factors = self.adapter.factors()
        delta = _on(self.delta, self.device)
        plain = [factor for factor in wanted if not decoupled[factor]]
        found = projected(delta, factors, of_a=A in plain, of_b=B in plain) if plain else (None, None)
        taken_off = made(factors) if plain and self.anchored else (None, None)
        for factor in wanted:
            if factor in plain:
                values, off = found[factor], taken_off[factor]
            else:
                values, off = self._merged(factor, delta, factors)
            assert values is not None
            self._sides[factor].take(values, off)
            self._sides[factor].made_of = made_of[factor]

    def _merged(self, factor: int, delta: Delta, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """Return the delta of a factor for `decoupled`, and what to subtract from it. B moves the weight within the
        span of A's rows; A moves it only if B is frozen."""
        if factor == B:
            return merged(delta, factors), factors.b if self.anchored else None
        if B in self._sides:
            return torch.zeros_like(factors.a, dtype=factors.dtype), None
        scaled = factors.b if factors.row_scale is None else factors.b * factors.row_scale.unsqueeze(1)
        mirrored = replace(factors, a=scaled.T, b=factors.a.T, row_scale=None, transposed=not factors.transposed)
        return merged(delta, mirrored).T, factors.a if self.anchored else None

    def _made_of(self, factor: int, decoupled: bool) -> MadeOf:
        """The inputs of a delta. The other factor is included only if it is frozen and the delta depends on no value
        that changes in every step."""
        other = self.adapter.params()[B if factor == A else A]
        if other.requires_grad or self.adapter.is_dora or self.anchored:
            return MadeOf(decoupled, None)
        return MadeOf(decoupled, (self.adapter.scale, id(other), version_of(other)))


class Adapted:
    """The adapters of a model: which weight each parameter is trained for, and the deltas of adapter parameters.
    Without adapters, each parameter is trained for itself.

    Args:
        prior: None without adapters.
        on_host: whether the weights' deltas stay in host memory.
        anchored: whether to subtract the part of the deltas that the adapters have already learned. Raises ValueError
            if that part cannot be known.
    """

    def __init__(self, prior: AdapterPrior | None, on_host: bool, anchored: bool) -> None:
        if prior is not None and anchored:
            _check_alone(prior)
        self.anchored = anchored
        self.refresh = 1 if prior is None else prior.refresh
        self._adapters = {} if prior is None else prior.adapters_by_name()
        self._renamed = {} if prior is None else prior.renamed_plainly()
        self._on_host = on_host
        self._projections: dict[tuple[str, str], Projection] = {}  # by the names of A and B

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_projections": {}}

    def adapter_of(self, name: str) -> Adapter | None:
        """The adapter that a parameter belongs to; None if it belongs to none."""
        return self._adapters.get(without_wrappers(name)) if self._adapters else None

    def weight_of(self, name: str) -> str:
        """The live name of the weight that a parameter is trained for; without adapters, its own name."""
        adapter = self.adapter_of(name)
        if adapter is not None:
            return adapter.weight
        return self._renamed.get(without_wrappers(name), name) if self._renamed else name

    def weights(self, named_parameters: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The weights that these parameters are trained for, each with a tensor of its shape. A weight with adapters
        is listed once."""
        adapters = {name: self.adapter_of(name) for name, _ in named_parameters}
        adapted = {
            a.weight: torch.empty(a.shape, dtype=torch.float32, device="meta")
            for a in adapters.values()
            if a is not None
        }
        # A base under adapters may be quantised: its codes have other shapes, and are not trained.
        own = [
            (self.weight_of(name), param)
            for name, param in named_parameters
            if adapters[name] is None and (param.is_floating_point() or not self._adapters)
        ]
        return own + list(adapted.items())

    def check_params(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Raise PriorError if an adapter parameter is no longer the one in the model."""
        for name, param in named_parameters if self._adapters else ():
            adapter = self.adapter_of(name)
            if adapter is not None and adapter.params()[self._factor(name, adapter)] is not param:
                raise PriorError(
                    f"parameter {name} is not the current one of the model that lora_prior was called for, so its "
                    "delta would follow the wrong values: call lora_prior for the model that is trained"
                )

    def bind(self, name: str, param: Tensor, shard: Shard | None, load: Callable[[torch.device], Delta]) -> Side:
        """Bind an adapter parameter, whose local tensor is `param`. `load` loads the delta of its weight."""
        adapter = self.adapter_of(name)
        assert adapter is not None
        found = self._projections.get(adapter.names)
        if found is None or found.device != param.device:
            delta = load(torch.device("cpu") if self._on_host else param.device)
            if delta.shape[0] < adapter.shape[0]:  # tokens were added
                delta = with_rows(delta, adapter.shape[0])
            if self._on_host and param.is_cuda:
                delta = _each(delta, Tensor.pin_memory)
            found = self._projections[adapter.names] = Projection(adapter, delta, param.device, self.anchored)
        return found.bind(self._factor(name, adapter), param, shard)

    def delta_of(self, name: str) -> Delta:
        """The delta of the weight of a bound adapter parameter."""
        return self._projections[self._adapters[without_wrappers(name)].names].delta

    def share(self, name: str, param: Tensor, state: dict[str, Any]) -> None:
        """Keep the delta of an adapter parameter in its state, if it is needed beyond the step. If the state already
        has one, which was loaded, take its values."""
        adapter = self.adapter_of(name)
        if adapter is None or self.refresh == 1:
            return
        side = self._projections[adapter.names].side(self._factor(name, adapter))
        saved = state.get(PROJECTED)
        if saved is not None and local(saved) is not side.delta:
            side.take(whole(saved))
            side.made_of = MadeOf(None, None)
        state[PROJECTED] = wrap(side.delta, param)

    def forget(self) -> None:
        """Mark all deltas to be made anew, because the values of the parameters have been replaced."""
        for projection in self._projections.values():
            projection.forget()

    def renew(self, decoupled: Mapping[str, bool], due: bool) -> None:
        """Renew the deltas of these parameters, by name, each for scaling "decoupled" or for the other scalings. If not
        `due`, renew only those that were never made, or were made for the other kind of scaling."""
        of_adapters: dict[tuple[str, str], dict[int, bool]] = {}
        for name, is_decoupled in decoupled.items():
            adapter = self._adapters[without_wrappers(name)]
            of_adapters.setdefault(adapter.names, {})[self._factor(name, adapter)] = is_decoupled
        for names, factors in of_adapters.items():
            self._projections[names].renew(factors, due)

    def nbytes(self) -> int:
        """The bytes of the weights' deltas that are held for projection."""
        deltas = [projection.delta for projection in self._projections.values()]
        return sum(tensor.nbytes for delta in deltas for tensor in tensors_of(delta))

    @staticmethod
    def _factor(name: str, adapter: Adapter) -> int:
        return [without_wrappers(own) for own in adapter.names].index(without_wrappers(name))


def _check_alone(prior: AdapterPrior) -> None:
    """Raise ValueError unless each weight is moved by a single adapter alone, and followed in every step."""
    if prior.refresh != 1:
        raise ValueError(f"anchor=True must follow adapters in every step: refresh must be 1, got {prior.refresh}")
    weights = [adapter.weight for adapter in prior.adapters]
    for adapter in prior.adapters:
        if adapter.is_dora or weights.count(adapter.weight) > 1:
            why = "DoRA's magnitudes move it too" if adapter.is_dora else "several adapters move it"
            raise ValueError(
                f"anchor=True follows a weight through its adapter alone, and cannot follow {adapter.weight}: {why}"
            )


def _on(delta: Delta, device: torch.device) -> Delta:
    """Return the delta on the adapter's device; a copy from pinned memory is asynchronous."""
    return delta if delta.device == device else _each(delta, lambda tensor: tensor.to(device, non_blocking=True))


def _each(delta: Delta, function: Callable[[Tensor], Tensor]) -> Delta:
    changed = [function(tensor) for tensor in tensors_of(delta)]
    return changed[0] if isinstance(delta, Tensor) else type(delta)(*changed)
