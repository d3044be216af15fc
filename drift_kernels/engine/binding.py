"""Binding of deltas to live parameters: by name, loaded when first needed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..adapters import AdapterPrior
from ..errors import PriorMismatchError
from ..prior import DeltaInfo, LowRankDelta, Prior, PriorLike, QuantizedDelta
from ..prior.deltas import Delta, expanded, norm_of, with_rows
from ..prior.fusion import Source, stored_names
from ..prior.names import module_of
from ..prior.strengths import Strengths
from ..sharding import Reduction, Shard
from ..state.param_groups import check_names, named_params
from .anchoring import Anchors
from .lookalikes import Candidate, check_not_weights
from .pinned import Readers
from .projecting import Adapted
from .reach import check_reach, say_reach

logger = logging.getLogger("drift_kernels")


@dataclass(frozen=True)
class BoundDelta:
    """A delta on the device where the kernels read it.

    Attributes:
        delta: the delta, or its codes.
        delta_scale: the scales of codes.
        delta_norm, param_norm: norm(delta) and norm(W), computed in float64; if the delta is renewed in place, those of
            the weight and its delta at the start.
        alpha: the factor of the param group's alpha.
        readers: the streams that read the delta, if it is in pinned memory.
        norm: float64 [] on its device, the current norm of a delta that is renewed in place.
        whole_norm: likewise, the norm that an anchored delta had at the start.
    """

    delta: Tensor
    delta_scale: Tensor | None
    delta_norm: float
    param_norm: float
    alpha: float = 1.0
    readers: Readers | None = None
    norm: Tensor | None = None
    whole_norm: Tensor | None = None

    def fits(self, param: Tensor) -> bool:
        """Whether it has the parameter's shape and, if it is renewed in place, the parameter's device."""
        return self.delta.shape == param.shape and (self.norm is None or self.norm.device == param.device)

    @property
    def stored(self) -> Tensor | QuantizedDelta:
        return self.delta if self.delta_scale is None else QuantizedDelta(self.delta, self.delta_scale)

    def to(self, device: torch.device) -> BoundDelta:
        scale = None if self.delta_scale is None else self.delta_scale.to(device)
        return replace(self, delta=self.delta.to(device), delta_scale=scale)


class PriorBinding:
    """A prior matched to named parameters.

    `check` checks names and shapes at once; `bind` loads the data later, because FSDP2, Accelerate and device moves may
    replace parameters in between. A copied or unpickled binding loads its data again.
    """

    def __init__(
        self,
        given: Prior | AdapterPrior,
        on_host: bool = False,
        strengths: Strengths | None = None,
        anchored: bool = False,
    ) -> None:
        adapted = given if isinstance(given, AdapterPrior) else None
        self.prior = prior = given if isinstance(given, Prior) else given.prior
        self.adapted = Adapted(adapted, on_host, anchored)
        self.anchors = Anchors() if anchored else None
        self._on_host = on_host  # whether deltas stay in pinned host memory
        self._alphas = dict.fromkeys(prior.names, 1.0) if strengths is None else strengths.of(prior.names)
        self._readers = Readers()
        self._idle_said = False
        self._sources: dict[str, str | Source] = {}  # by live name; one stored delta by its own name
        self._infos: dict[str, DeltaInfo] = {}  # by live name
        self._checked: dict[str, torch.Size] = {}
        self._param_norms: dict[str, float] = {}  # norm(W) of the parameters when they were first bound
        self._bound: dict[str, BoundDelta] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_bound": {},
            "anchors": None if self.anchors is None else Anchors(),
            "_readers": Readers(),
        }

    @classmethod
    def of(
        cls,
        prior: PriorLike | AdapterPrior,
        device: str | torch.device | None,
        strengths: Strengths | None = None,
        anchored: bool = False,
    ) -> PriorBinding:
        """Return a binding of a prior: a Prior, its folder, a mapping from names to deltas, or a prior for adapters.
        `device`: "cpu" or None."""
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"prior_device must be 'cpu', or None for the device of each parameter, got {device}")
        if anchored and device is not None and not isinstance(prior, AdapterPrior):
            raise ValueError(
                f"anchor=True keeps its deltas on the parameters' devices: prior_device must be None, got {device}"
            )
        given = prior if isinstance(prior, AdapterPrior) else Prior.of(prior)
        return cls(given, device is not None, strengths, anchored)

    def check(self, named_parameters: list[tuple[str, Tensor]]) -> None:
        """Match the parameters, unless they were all checked the last time, and log which ones the prior acts on.

        Raises:
            PriorMismatchError: If no name matches, or the shape of a matched delta differs from that of its parameter
                (except for tokens added to a vocabulary, whose delta is zero). The first time, also if all matching
                parameters are frozen, or all their deltas are zero. Parameters may be frozen later.
        """
        shapes = {name: param.shape for name, param in named_parameters}
        if shapes and shapes.items() <= self._checked.items():
            return
        weights = self.adapted.weights(named_parameters)
        coverage = self.prior.match(weights)
        if coverage.shape_mismatches:
            name, prior_name, shape, prior_shape = coverage.shape_mismatches[0]
            raise PriorMismatchError(
                f"parameter {name!r} has shape {tuple(shape)}, but the prior's delta {prior_name!r} has shape "
                f"{tuple(prior_shape)} ({len(coverage.shape_mismatches)} such parameters): it was built for another "
                "model"
            )
        of_weights = {
            weight: source.single.name if source.single else source
            for weight, source in coverage.sources.items()
            if all(part.name in self._alphas for part in source.parts)
        }
        weight_of = {name: self.adapted.weight_of(name) for name in shapes}
        sources = {name: of_weights[weight] for name, weight in weight_of.items() if weight in of_weights}
        if not sources:
            raise PriorMismatchError(f"the patterns of alpha match none of the {len(coverage.matched)} matching deltas")
        if not self._checked:
            check_reach(self.prior, named_parameters, sources)
        say_reach(named_parameters, sources, self._grown(weights, of_weights))
        self._sources, self._infos = sources, {}
        self._checked = shapes

    def _grown(self, weights: list[tuple[str, Tensor]], sources: Mapping[str, str | Source]) -> list[str]:
        """The weights with more rows than their deltas."""
        stored = [(name, like, sources[name]) for name, like in weights if isinstance(sources.get(name), str)]
        return [name for name, like, delta in stored if like.shape != self.prior.info(delta).shape]

    def covers(self, name: str) -> bool:
        """Whether there is a delta for this parameter. Call `check` first."""
        return name in self._sources

    def covered(self, param_groups: list[dict[str, Any]]) -> list[str]:
        """The names of the parameters in these groups that have a delta. Raises PriorError like `check`, and for groups
        whose parameters have no names."""
        for index, group in enumerate(param_groups):
            check_names(group, index)
        named = named_params(param_groups)
        self.check(named)
        return [name for name, _ in named if self.covers(name)]

    def module(self, name: str) -> str:
        """The module (`names.MODULES`, or "other") of the delta of a covered parameter."""
        return module_of(stored_names(self._sources[name])[0])

    def bind(self, named: Sequence[tuple[str, Tensor, Shard | None]]) -> list[BoundDelta | None]:
        """Return the delta of each parameter (this rank's shard, or all of it) on its device; None if the prior has no
        delta for it. A rank reads only the part of the prior that it needs.

        Raises PriorFormatError if a delta is damaged, PriorMismatchError if ranks have different priors, and PriorError
        if deltas are weights.
        """
        if not self._idle_said and not any(name in self._sources for name, _, _ in named):
            logger.warning("the prior has no effect in this step: no parameter that it covers has a gradient")
            self._idle_said = True
        new = [
            (name, param, shard)
            for name, param, shard in named
            if name in self._sources and (name not in self._bound or not self._bound[name].fits(param))
        ]
        self._compare(Reduction([shard for _, _, shard in new]), new)
        for name, param, shard in new:
            if name in self._bound:
                self._param_norms.pop(name, None)  # the parameter has been replaced
            load = self._load if self.adapted.adapter_of(name) is None else self._project
            self._bound[name] = load(name, param, shard)
        self._measure([entry for entry in new if entry[2] is not None and self._bound[entry[0]].norm is None])
        for name, _, _ in new:
            norm_at_first = self._param_norms.setdefault(name, self._bound[name].param_norm)
            self._bound[name] = replace(self._bound[name], param_norm=norm_at_first)
        check_not_weights([self._candidate(*entry) for entry in new if self._info(entry[0]).param_norm is None])
        return [self._placed(name, param) if name in self._sources else None for name, param, _ in named]

    def nbytes(self) -> int:
        """The bytes of the tensors that renewed deltas are computed from."""
        return self.adapted.nbytes() + (0 if self.anchors is None else self.anchors.nbytes())

    @property
    def keeps_in_states(self) -> bool:
        """Whether the prior keeps tensors in optimizer states."""
        return self.anchors is not None or self.adapted.refresh > 1

    def keep(self, name: str, param: Tensor, state: dict[str, Any]) -> BoundDelta:
        """Keep what the prior needs beyond a step in the state of a bound parameter: the target that it is pulled to,
        or the delta of an adapter. Uses what the state already holds. Returns the delta that steps read."""
        if self.adapted.adapter_of(name) is not None:
            self.adapted.share(name, param, state)
        elif self.anchors is not None:
            bound = self._bound[name]
            delta = bound.stored if bound.norm is None else None
            anchor = self.anchors.bind(name, param, state, delta, bound.delta_norm)
            self._bound[name] = replace(
                bound, delta=anchor.left, delta_scale=None, norm=anchor.norm, whole_norm=anchor.whole_norm
            )
        return self._bound[name]

    def renew(self, params: Mapping[str, tuple[Tensor, bool]], due: bool, with_norms: bool) -> None:
        """Renew the deltas that depend on these parameters: by name, the local tensor and whether its scaling moves
        parameters. Deltas of adapters are renewed if `due`; the norms of the others are computed if `with_norms`."""
        adapted = {name for name in params if self.adapted.adapter_of(name) is not None}
        self.adapted.renew({name: decoupled for name, (_, decoupled) in params.items() if name in adapted}, due)
        if self.anchors is not None:
            own = {name: param for name, (param, _) in params.items() if name not in adapted}
            self.anchors.renew(own, with_norms)

    def _load(self, name: str, param: Tensor, shard: Shard | None) -> BoundDelta:
        """Load a delta. For a shard, the norms are those of the shard, until `_measure`."""
        info, stored = self._info(name), self._stored(name, param, shard)
        delta_norm = info.delta_norm if shard is None else norm_of(stored)
        delta, scale = for_kernels(stored, info.dtype, param.dtype)
        readers = self._readers if self._on_host and param.is_cuda else None
        if readers is not None:
            delta, scale = delta.pin_memory(), None if scale is None else scale.pin_memory()
            for pinned in (delta, scale):
                if pinned is not None:
                    readers.guard(pinned)
        param_norm = info.param_norm
        if param_norm is None:
            param_norm = float(torch.linalg.vector_norm(param.detach(), dtype=torch.float64))
        return BoundDelta(delta, scale, delta_norm, param_norm, self._alpha(name), readers)

    def _project(self, name: str, param: Tensor, shard: Shard | None) -> BoundDelta:
        """The delta of an adapter parameter, zero until it is renewed."""
        source, info, adapter = self._sources[name], self._info(name), self.adapted.adapter_of(name)
        assert adapter is not None
        side = self.adapted.bind(name, param, shard, lambda device: self.prior.load_stored(source, device, copy=False))
        param_norm = norm_of(adapter.base_weight()) if info.param_norm is None else info.param_norm
        whole_norm = side.whole_norm if self.adapted.anchored else None
        alpha = self._alpha(name)
        return BoundDelta(side.delta, None, info.delta_norm, param_norm, alpha, norm=side.norm, whole_norm=whole_norm)

    def _alpha(self, name: str) -> float:
        """The alpha of a parameter. If a joined delta's parts match different patterns, the first part decides."""
        return self._alphas[stored_names(self._sources[name])[0]]

    def _stored(self, name: str, param: Tensor, shard: Shard | None) -> Delta:
        """The delta of this rank's part; zero for tokens that the prior does not have."""
        source, info, device = self._sources[name], self._info(name), self._device_for(param)
        whole, part = (tuple(param.shape), None) if shard is None else (shard.shape, shard.box)
        if whole == info.shape:
            return self.prior.load_stored(source, device, copy=False, box=part)
        if part is None:
            return with_rows(self.prior.load_stored(source, device, copy=False), whole[0])
        begin, end = (min(row, info.shape[0]) for row in (part[0].start, part[0].stop))
        if begin == end:
            dtype = info.dtype if info.dtype in (torch.float32, torch.bfloat16) else torch.float32
            return torch.zeros(param.shape, dtype=dtype, device=device)
        known = (slice(begin, end), *part[1:])
        return with_rows(self.prior.load_stored(source, device, copy=False, box=known), len(param))

    def _candidate(self, name: str, param: Tensor, shard: Shard | None) -> Candidate:
        bound, adapter = self._bound[name], self.adapted.adapter_of(name)
        delta = bound.stored if adapter is None else self.adapted.delta_of(name)
        if adapter is not None:
            param, shard = adapter.base_weight(), None
        ratio = bound.delta_norm / bound.param_norm if bound.param_norm else math.inf
        return Candidate(name, param, shard, self._info(name).shape, delta, ratio)

    def _info(self, name: str) -> DeltaInfo:
        if name not in self._infos:
            self._infos[name] = self.prior.info(self._sources[name])
        return self._infos[name]

    def _measure(self, new: list[tuple[str, Tensor, Shard | None]]) -> None:
        """Sum over the ranks the parts of norm(W), which the prior may not have recorded, and of norm(delta), which is
        checked. Both come from `_load`."""
        if not new:
            return
        found = [self._bound[name] for name, _, _ in new]
        rows = [[bound.delta_norm**2, bound.param_norm**2] for bound in found]
        squares = torch.tensor(rows, dtype=torch.float64, device=new[0][1].device)
        Reduction([shard for _, _, shard in new]).sum_(squares)
        for (name, _, _), bound, (delta_norm, param_norm) in zip(new, found, squares.sqrt().tolist(), strict=True):
            self.prior.check_norm_of_parts(self._sources[name], delta_norm)
            info = self._info(name)
            whole = param_norm if info.param_norm is None else info.param_norm
            self._bound[name] = replace(bound, delta_norm=info.delta_norm, param_norm=whole)

    def _compare(self, reduction: Reduction, new: list[tuple[str, Tensor, Shard | None]]) -> None:
        for group in reduction.groups:
            mark = int(self.prior.fingerprint[:12], 16)
            marks = torch.tensor([mark, -mark], dtype=torch.int64, device=new[0][1].device)
            dist.all_reduce(marks, dist.ReduceOp.MIN, group=group)
            if int(marks.sum()) != 0:
                raise PriorMismatchError(
                    f"ranks have different priors: this rank has {self.prior.fingerprint[:12]} ({self.prior})"
                )

    def _device_for(self, param: Tensor) -> torch.device:
        return torch.device("cpu") if self._on_host else param.device

    def _placed(self, name: str, param: Tensor) -> BoundDelta:
        found = self._bound[name]
        if found.norm is None and found.delta.device != self._device_for(param):
            found = self._bound[name] = found.to(self._device_for(param))
        return found


def for_kernels(delta: Delta, dtype: torch.dtype, param_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Convert a delta stored in `dtype` to what kernels read for a parameter's dtype: codes with scales only for
    bfloat16 parameters; factors are expanded, for bfloat16 parameters to bfloat16, and so are deltas joined from
    bfloat16 factors."""
    beside_bfloat16 = param_dtype == torch.bfloat16
    if isinstance(delta, QuantizedDelta) and beside_bfloat16:
        return delta.codes, delta.scales
    if beside_bfloat16 and (isinstance(delta, LowRankDelta) or dtype == torch.bfloat16):
        return expanded(delta).to(torch.bfloat16), None
    return expanded(delta), None
